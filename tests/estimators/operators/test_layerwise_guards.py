"""Gradients layer by layer of models whose other examples go other ways than those that the proof looked at."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fimo.estimators import parse
from fimo.estimators.differentiable import estimating
from fimo.estimators.operators import layerwise
from fimo.estimators.operators.layerwise import layerwise as way_to
from fimo.workers.workload import Workload
from tests.estimators import problems

COUNT, TOKENS = 17, 5
PROVEN = [0, COUNT // 2, COUNT - 1]
"""What a proof looks at without padding."""


@pytest.fixture(autouse=True)
def every_model_is_large(monkeypatch):
    monkeypatch.setattr(layerwise, "LARGE", 0)
    monkeypatch.setattr(layerwise, "scalars_at_once", lambda _: 300)


class PastItsForward(nn.Module):
    """Uses a layer's weight functionally too, for some examples."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, batch):
        hidden = torch.tanh(self.body(batch["x"]))
        if bool(batch["odd"].any()):
            hidden = hidden + batch["odd"][:, None] * F.linear(batch["x"].cos(), self.body.weight)
        return self.last(hidden)


class Selecting(nn.Module):
    """Takes the marked tokens of all examples out and through its layers, flat: one of most, none or two of some."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, batch):
        marked = batch["marked"]
        hidden = torch.zeros(*marked.shape, 3, dtype=batch["tokens"].dtype)
        hidden[marked] = self.last(torch.tanh(self.body(batch["tokens"][marked])))
        return hidden.sum(1)


class Routed(nn.Module):
    """An expert that none of the proven examples is sent to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, batch):
        x, odd = batch["tokens"], batch["odd"] > 0
        hidden = x.new_zeros(*x.shape[:2], 4)
        for expert, own in ((self.first, ~odd), (self.second, odd)):
            if bool(own.any()):
                hidden[own] = expert(x[own])
        return self.last(torch.tanh(hidden).mean(1))


class Placing(nn.Module):
    """Positions that all examples share, unless one of a batch has others."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.last = nn.Embedding(TOKENS, 4), nn.Linear(4, 3)

    def forward(self, batch):
        places = torch.arange(TOKENS)[None]
        if bool(batch["odd"].any()):
            places = torch.where(batch["odd"][:, None] > 0, places // 2, places)
        return self.last(torch.tanh(batch["tokens"] + self.places(places)).mean(1))


MODELS = [PastItsForward, Selecting, Routed, Placing]


def data(n, seed):
    g = torch.Generator().manual_seed(seed)
    odd = torch.zeros(n)
    odd[1:7] = 1
    marked = F.one_hot(torch.randint(TOKENS, (n,), generator=g), TOKENS).bool()
    for none, two in ((2, 3), (5, 4)) if n == COUNT else ():
        marked[none], marked[two] = False, torch.tensor([0, 1, 1, 0, 0]).bool()
    return {
        "odd": odd.double(),
        "marked": marked,
        "x": torch.randn(n, 4, generator=g, dtype=torch.float64),
        "tokens": torch.randn(n, TOKENS, 4, generator=g, dtype=torch.float64),
        "label": torch.randint(3, (n,), generator=g),
    }


def problem(model, dtype=torch.float64):
    torch.manual_seed(0)
    workload = Workload(
        model().double(),
        data(COUNT, 1),
        data(5, 2),
        lambda m, b: m(b),
        lambda out, b: F.cross_entropy(out, b["label"], reduction="none"),
    )
    return problems.problem(workload, [[i] for i in range(COUNT)] + [[1, 2, 9]], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("model", MODELS)
def test_examples_that_go_other_ways_than_the_proven_have_their_own_gradients(model, dtype):
    p = problem(model, dtype)
    with estimating(p.model):
        way = way_to(p.model, p.model.loss, p.train)
        assert way is not None
        found = way.rows(range(COUNT))
        truth = torch.stack([problems.gradient(p.model, p.model.loss, p.train, i) for i in range(COUNT)])
    close = {torch.float64: (1e-9, 1e-12), torch.float32: (1e-4, 1e-6)}[dtype]
    torch.testing.assert_close(found, truth.to(found), rtol=close[0], atol=close[1])


ENTRIES = ["grad_dot", "grad_cos", "datainf", {"name": "trak", "dimension": 16}, {"name": "ekfac", "damping": 0.1}]


@pytest.mark.parametrize(
    ("model", "entry"),
    # Which weights EK-FAC leaves out is told by its first examples, which are others for a large model.
    [(model, entry) for model in MODELS for entry in (ENTRIES[:-1] if model is PastItsForward else ENTRIES)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_estimates_of_them_are_those_of_rows(model, entry, monkeypatch):
    p = problem(model)
    (estimator,) = parse(entry)
    found = estimator.estimate(p)
    monkeypatch.setattr(layerwise, "LARGE", 2**40)
    monkeypatch.setattr(layerwise, "_stacks", lambda *_: True)
    torch.testing.assert_close(found.values, estimator.estimate(problem(model)).values, rtol=1e-8, atol=1e-11)
