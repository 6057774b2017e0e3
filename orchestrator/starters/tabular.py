"""A table with a network: the module of tabular.yaml. Replace what it draws by your own data and model."""

import torch
from torch import nn

from fimo import Workload


def table(n=240, columns=8):
    """Rows and targets. Yours: numpy.load, or torch.as_tensor(pandas.read_csv(file).to_numpy(dtype="float32"))."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, columns, generator=g)
    y = torch.sin(x[:, 0]) + 0.5 * x[:, 1] * x[:, 2] + 0.3 * torch.randn(n, generator=g)
    return x, y


def workload(hidden=32):
    """What fimo calls, in every process and with the same result: no random number without a seed."""
    x, y = table()
    torch.manual_seed(0)
    # Your final model. Load its parameters here, or name a .safetensors file in the spec (final_model).
    model = nn.Sequential(nn.Linear(x.shape[1], hidden), nn.Tanh(), nn.Linear(hidden, 1))
    return Workload(
        model,
        train={"x": x[:-40], "y": y[:-40]},
        evals={"x": x[-40:], "y": y[-40:]},
        outputs=lambda model, batch: model(batch["x"])[:, 0],
        # One number for each example, no mean. For classes: nn.functional.cross_entropy(out, y, reduction="none").
        loss=lambda out, batch: (out - batch["y"]) ** 2,
        # g, what an example's removal is to change; without it, the loss.
        # measure=lambda out, batch: out,
    )
