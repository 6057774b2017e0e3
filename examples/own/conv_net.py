"""A convolutional network with batch norm, and crops and flips that belong to (seed, step, example)."""

import torch
from torch import nn

from fimo import Workload
from fimo.workers.workloads.images import augment


def outputs(model, batch):
    # By the example's own index: dropping another must not give it another's crop.
    return model(augment(batch["x"], batch["index"]) if model.training else batch["x"])


def images(n=120, width=6):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (n,), generator=g)
    x = torch.randn(n, 1, 12, 12, generator=g) + torch.eye(3)[y].repeat_interleave(4, 1)[:, None, :, None]
    data = {"x": x, "y": y, "index": torch.arange(n)}
    train, evals = ({k: v[part] for k, v in data.items()} for part in (slice(0, -20), slice(-20, None)))
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(9 * width, 3),
    )
    return Workload(
        model, train, evals, outputs, lambda out, b: nn.functional.cross_entropy(out, b["y"], reduction="none")
    )
