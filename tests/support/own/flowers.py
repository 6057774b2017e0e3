"""A user's own workload module, as one would lie beside a spec: no import of fimo but the contract."""

import torch
from torch import nn

from fimo import Workload


def _tensors(count, seed, width=4):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=g)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    return {"features": x, "label": y}


def _model(width=4, hidden=6):
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 3))


def _outputs(model, batch):
    return model(batch["features"])


def _loss(outputs, batch):
    return nn.functional.cross_entropy(outputs, batch["label"], reduction="none")


def flowers(n=23, m=7):
    """Three classes, integer labels, dict batches."""
    return Workload(_model(), _tensors(n, 0), _tensors(m, 1), _outputs, _loss)


class Sentences:
    """A map-style dataset with a ``collate`` that pads to the longest of the batch."""

    def __init__(self, count, seed):
        g = torch.Generator().manual_seed(seed)
        self.items = []
        for _ in range(count):
            length = int(torch.randint(2, 6, (1,), generator=g))
            tokens = torch.randint(1, 11, (length,), generator=g)
            self.items.append({"tokens": tokens, "label": int(tokens.sum() % 2)})

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def collate(self, items):
        tokens = nn.utils.rnn.pad_sequence([i["tokens"] for i in items], batch_first=True)
        return {"tokens": tokens, "label": torch.tensor([i["label"] for i in items])}


class Bag(nn.Module):
    """Mean of embeddings, then a linear layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 5, padding_idx=0)
        self.out = nn.Linear(5, 2)

    def forward(self, tokens):
        mask = (tokens != 0).unsqueeze(-1)
        return self.out((self.embed(tokens) * mask).sum(1) / mask.sum(1))


def sentences(n=17, m=5):
    """A dataset with a collate, batches of differing shapes, a measure of its own."""
    torch.manual_seed(3)
    return Workload(
        Bag(),
        Sentences(n, 0),
        Sentences(m, 1),
        outputs=lambda model, batch: model(batch["tokens"]),
        loss=_loss,
        measure=lambda outputs, batch: outputs.gather(1, batch["label"][:, None])[:, 0],
    )


def scalar_loss():
    """The mean-or-sum trap."""
    w = flowers()
    return Workload(w.model, w.train, w.evals, w.outputs, lambda o, b: _loss(o, b).mean())


def nan_loss():
    """Not finite at the final model."""
    w = flowers()
    return Workload(w.model, w.train, w.evals, w.outputs, lambda o, b: _loss(o, b) * float("nan"))


def fails():
    """Raises."""
    raise ValueError("the data is not there")


def not_one():
    """Returns something else."""
    return {"model": None}
