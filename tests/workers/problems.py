"""Small workloads: 23 training examples in batches of 5 unless said otherwise, so that the last batch is ragged."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.start import Start, start_from
from fimo.workers.workload import Workload

N = 23
SGD = Optimizer("sgd", lr=0.05)


def settings(
    optimizer: Optimizer = SGD, *, batch_size: int = 5, precision: str = "float64", **more: object
) -> FurtherTraining:
    if "epochs" not in more and "steps" not in more:
        more["epochs"] = 3
    return FurtherTraining(optimizer, batch_size=batch_size, precision=precision, **more)


def make(workload: Workload, chosen: FurtherTraining) -> Start:
    dtype = getattr(torch, chosen.precision)
    train, evals = (Examples(s, workload.collate, dtype=dtype) for s in (workload.train, workload.evals))
    return start_from(FunctionalModel(workload, dtype=dtype, trains=chosen.trains), train, evals, chosen)


def every_step(last: int) -> Evaluate:
    return Evaluate(at_steps=tuple(range(1, last + 1)))


def squared_error(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return (outputs - batch["y"]) ** 2


def cross_entropy(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(outputs, batch["label"], reduction="none")


def outputs_of_x(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"])


def _numbers(count: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def regression(n: int = N, evals: int = 7, middle: nn.Module | None = None) -> Workload:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), middle or nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    x = _numbers(n + evals, 4)
    y = x[:, 0] * x[:, 1] + _numbers(n + evals, seed=2)
    return Workload(
        model,
        {"x": x[:n], "y": y[:n]},
        {"x": x[n:], "y": y[n:]},
        outputs=lambda model, batch: model(batch["x"]).squeeze(-1),
        loss=squared_error,
    )


def classification(n: int = N, evals: int = 6, model: nn.Module | None = None, *shape: int) -> Workload:
    """Integer labels, and a measure that is not the loss: the logit of the label."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = _numbers(n + evals, *(shape or (4,)))
    label = torch.randint(3, (n + evals,), generator=torch.Generator().manual_seed(3))
    return Workload(
        model,
        {"x": x[:n], "label": label[:n]},
        {"x": x[n:], "label": label[n:]},
        outputs=outputs_of_x,
        loss=cross_entropy,
        measure=lambda outputs, batch: outputs.gather(1, batch["label"][:, None]).squeeze(1),
    )


class Sentences:
    """A map-style dataset of token lists of different lengths, padded within each batch to its longest."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw = lambda low, high, *size: torch.randint(low, high, size, generator=generator)  # noqa: E731
        self.items = [(draw(1, 20, int(draw(2, 7, 1))), int(draw(0, 3, 1))) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.items[index]

    def collate(self, items: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        tokens = nn.utils.rnn.pad_sequence([tokens for tokens, _ in items], batch_first=True)
        return {"tokens": tokens, "mask": tokens > 0, "label": torch.tensor([label for _, label in items])}


class MeanOfWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.classes = nn.Embedding(20, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        each = torch.tanh(self.words(tokens)) * mask[..., None]
        return self.classes(each.sum(1) / mask.sum(1, keepdim=True))


def sentences(n: int = N, evals: int = 6) -> Workload:
    torch.manual_seed(0)
    return Workload(
        MeanOfWords(),
        Sentences(n, 1),
        Sentences(evals, 2),
        outputs=lambda model, batch: model(batch["tokens"], batch["mask"]),
        loss=cross_entropy,
    )


class Encoder(nn.Module):
    """torch's own layer of a transformer, with dropout, over examples of (length, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.layer(x).mean(1))
        return logits
