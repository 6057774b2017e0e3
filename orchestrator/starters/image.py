"""Images with a convolutional network: the module of image.yaml. Replace what it draws by your own data and model."""

import torch
from torch import nn

from fimo import Workload


def images(n=150, classes=3):
    """Images (n, 1, 8, 8) of bars and their classes. Yours: tensors, or a dataset of torchvision as it is.

    A dataset goes to Workload(train=dataset, evals=dataset, collate=…); a batch is then what collate returns.
    """
    g = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (n,), generator=g)
    x = 0.7 * torch.randn(n, 1, 8, 8, generator=g)
    x[torch.arange(n), 0, 2 * y] += 1
    return x, y


def workload(width=8):
    """What fimo calls, in every process and with the same result: no random number without a seed."""
    x, y = images()
    torch.manual_seed(0)
    # Your final model. Load its parameters here, or name a .safetensors file in the spec (final_model).
    model = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * width, 3),
    )
    # With batch norm in the model fimo takes an example out of its batch (removal_mode: mask), since there it cannot
    # be reweighted; further_training: {mode: eval} freezes the statistics instead.
    return Workload(
        model,
        train={"x": x[:-30], "y": y[:-30]},
        evals={"x": x[-30:], "y": y[-30:]},
        # Crops and flips belong here, by a seed of the example's own: fimo.workers.workloads.images.augment.
        outputs=lambda model, batch: model(batch["x"]),
        loss=lambda out, batch: nn.functional.cross_entropy(out, batch["y"], reduction="none"),
    )
