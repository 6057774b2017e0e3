"""Small workloads, their final models and their cells trained further: what `trust.py` and `control.py` measure on.

Every model fits in seconds, all data ships with installed packages or is drawn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.shard import run_shard
from fimo.workers.start import Start, start_from
from fimo.workers.workload import Workload
from fimo.workers.workloads.tabular import concrete, mlp

Array = NDArray[np.float64]
REMOVALS, EVALS = 15, 20


def cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(outputs, batch["label"], reduction="none")


def fitted(workload: Workload, steps: int, lr: float) -> Workload:
    """A final model: some steps of Adam on random batches of 32."""
    train: Any = workload.train
    optimizer = torch.optim.Adam(workload.model.parameters(), lr)
    generator = torch.Generator().manual_seed(0)
    size = len(next(iter(train.values())))
    workload.model.train()
    for _ in range(steps):
        chosen = torch.randint(size, (32,), generator=generator)
        batch = {name: tensor[chosen] for name, tensor in train.items()}
        optimizer.zero_grad()
        workload.loss(workload.outputs(workload.model, batch), batch).mean().backward()
        optimizer.step()
    return workload


def classifier(model: nn.Module, x: Tensor, label: Tensor, train: int, steps: int, lr: float) -> Workload:
    own, evals = ({"x": x[rows], "label": label[rows]} for rows in (slice(0, train), slice(train, train + EVALS)))
    return fitted(Workload(model, own, evals, lambda m, batch: m(batch["x"]), cross_entropy), steps, lr)


def cancer() -> Workload:
    """Breast cancer Wisconsin (scikit-learn), 455 rows to train on, and a perceptron 30-32-32-2."""
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, label = torch.tensor(features, dtype=torch.float32)[order], torch.tensor(labels)[order].long()
    x = (x - x[:455].mean(dim=0)) / x[:455].std(dim=0)
    torch.manual_seed(0)
    return classifier(mlp(30, 32, 32, 2), x, label, 455, 200, 1e-3)


def conv() -> Workload:
    """Ten-class digits of scikit-learn, 8 × 8, 300 of them to train on."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    head = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    return classifier(nn.Sequential(*features, *head), x, torch.tensor(labels).long(), 300, 300, 3e-3)


def bert(train: int, tokens: int, marked: int, wrong: float, dropout: float) -> Workload:
    """A BERT of two layers that tells whether one of the first ``marked`` of ``tokens`` tokens occurs among twelve.

    Args:
        wrong: share of the training labels that are flipped.
    """
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + tokens,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 5 + tokens, (train + EVALS, 12), generator=generator)
    labels = (ids < 5 + marked).any(dim=1).long()
    flipped = torch.rand(train + EVALS, generator=generator) < wrong
    flipped[train:] = False
    labels = torch.where(flipped, 1 - labels, labels)
    own, evals = ({"ids": ids[rows], "label": labels[rows]} for rows in (slice(0, train), slice(train, None)))
    model = BertForSequenceClassification(config)
    return fitted(Workload(model, own, evals, lambda m, batch: m(batch["ids"]).logits, cross_entropy), 200, 1e-3)


@dataclass(frozen=True)
class Setting:
    """A workload and how it is trained further; ``steps``: the early and the late amount."""

    make: Callable[[], Workload]
    optimizer: Optimizer
    batch: int
    steps: tuple[int, int]
    replicas: int = REMOVALS + 1

    def start(self, mode: str, weight: float, precision: str) -> Start:
        workload, settings = self.make(), self.settings(mode, weight, precision)
        dtype, device = (torch.float64 if precision == "float64" else torch.float32), torch.device("cpu")
        train, evals = (Examples(of, None, device, dtype) for of in (workload.train, workload.evals))
        return start_from(FunctionalModel(workload, None, device, dtype), train, evals.first(EVALS), settings)

    def settings(self, mode: Any, weight: float, precision: Any) -> FurtherTraining:
        at = Evaluate(at_steps=self.steps)
        return FurtherTraining(
            self.optimizer,
            self.batch,
            steps=self.steps[-1],
            evaluate=at,
            removal_mode=mode,
            removal_weight=weight,
            precision=precision,
        )


SETTINGS = {
    "concrete": Setting(concrete, Optimizer("sgd", 0.03), 128, (8, 80)),
    "cancer": Setting(cancer, Optimizer("sgd", 0.05), 32, (15, 150)),
    "cancer-adamw": Setting(cancer, Optimizer("adamw", 5e-4), 32, (15, 150)),
    "conv": Setting(conv, Optimizer("sgd", 0.05), 32, (10, 50)),
    "text": Setting(partial(bert, 400, 55, 5, 0.1, 0.1), Optimizer("sgd", 0.002), 32, (13, 26)),
    "text-adamw": Setting(partial(bert, 400, 55, 5, 0.1, 0.1), Optimizer("adamw", 2e-5), 32, (13, 26)),
    "memorised": Setting(partial(bert, 200, 115, 9, 0.0, 0.1), Optimizer("adamw", 2e-5), 32, (7, 28)),
    "memorised-still": Setting(partial(bert, 200, 115, 9, 0.0, 0.0), Optimizer("adamw", 2e-5), 32, (7, 28)),
}


@dataclass(frozen=True)
class Cells:
    """Effects, float64 (S, R, T, m), and the seconds of processor time of the median seed."""

    effects: Array
    seconds: float


def removals_of(start: Start) -> list[tuple[int, ...]]:
    return [(i * len(start.train) // REMOVALS,) for i in range(REMOVALS)]


def effects_of(deltas: Tensor, weight: float) -> Array:
    """Of a shard's rows: removals, baseline, second baseline."""
    out: Array = ((deltas[:-2] - deltas[-2]) / weight).numpy()
    return out


def trained(start: Start, seeds: Sequence[int], replicas: int) -> Cells:
    effects, seconds = [], []
    for seed in seeds:
        began = time.process_time()
        run = run_shard(start, removals_of(start), seed, replicas, second=False)
        seconds.append(time.process_time() - began)
        effects.append(effects_of(run.deltas, start.settings.removal_weight))
    return Cells(np.stack(effects), statistics.median(seconds))
