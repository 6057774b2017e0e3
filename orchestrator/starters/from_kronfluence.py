"""A task of kronfluence: the module of from_kronfluence.yaml. Replace the task, the model and the data by your own."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

import fimo
from fimo import Workload

try:
    from kronfluence.task import Task
except ImportError:
    # Without the library the methods below are all that fimo asks of a task. Do not call this file kronfluence.py:
    # beside a spec it would hide the library.
    Task = object


class Classification(Task):
    """As in kronfluence's examples: losses are summed over the batch. Yours goes in its place as it is."""

    def compute_train_loss(self, batch, model, sample=False):
        """The training loss, one number for a batch; with ``sample``, which fimo never asks for, of drawn labels."""
        inputs, labels = batch
        logits = model(inputs)
        if sample:
            labels = torch.multinomial(logits.detach().softmax(-1), num_samples=1).flatten()
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch, model):
        """g, one number for a batch."""
        return self.compute_train_loss(batch, model)


def datasets(n=200):
    """Training and evaluation examples, map-style datasets as ``Analyzer`` takes them."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 8, generator=g)
    y = (x[:, :3] + 0.5 * torch.randn(n, 3, generator=g)).argmax(1)
    return TensorDataset(x[:-40], y[:-40]), TensorDataset(x[-40:], y[-40:])


def workload(hidden=16) -> Workload:
    """What fimo calls, in every process and with the same result: no random number without a seed."""
    train, evals = datasets()
    torch.manual_seed(0)
    # Your final model as it is before prepare_model.
    model = nn.Sequential(nn.Linear(8, hidden), nn.Tanh(), nn.Linear(hidden, 3))
    # Beside a task, outputs and loss let the estimators apply that need curvature in the outputs (EK-FAC, CG, LiSSA).
    # Leave both out if yours are hard to tell apart.
    return fimo.from_kronfluence(
        Classification(),
        model,
        train,
        evals,
        outputs=lambda model, batch: model(batch[0]),
        loss=lambda out, batch: nn.functional.cross_entropy(out, batch[1], reduction="none"),
    )
