"""Gradients taken layer by layer, against ``torch.autograd`` on one example at a time with all of its padding."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fimo.estimators import parse
from fimo.estimators.differentiable import estimating
from fimo.estimators.operators import layerwise, parts, rows
from fimo.estimators.operators.layerwise import layerwise as way_to
from fimo.estimators.problem import Problem
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.workload import Workload
from tests.estimators import problems

TOKENS = 7


@pytest.fixture(autouse=True)
def every_model_is_large(monkeypatch):
    monkeypatch.setattr(layerwise, "LARGE", 0)
    monkeypatch.setattr(parts, "TILE", 50)  # several tiles of every tensor
    monkeypatch.setattr(layerwise, "scalars_at_once", lambda _: 2000)  # several batches, the last one ragged


class Tied(nn.Module):
    """A language model's head on its own embedding, positions that all sentences share, two norms, and dropout."""

    def __init__(self, first=False) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 4, padding_idx=0), nn.Embedding(TOKENS, 4)
        self.norm, self.body, self.last = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.head, self.drop, self.rms = nn.Linear(4, 11, bias=False), nn.Dropout(0.5), nn.RMSNorm(4)
        self.head.weight = self.tokens.weight
        self.first = first

    def forward(self, batch):
        ids, mask = batch["ids"], batch["mask"].unsqueeze(2)
        places = torch.arange(ids.shape[1])
        hidden = self.tokens(ids) + self.places(places if self.first else places[None])
        hidden = self.rms(self.body(torch.tanh(self.body(self.norm(self.drop(hidden))))))  # called twice
        hidden = hidden + 0.1 * self.head(hidden) @ self.tokens.weight  # the head's weight past its forward, too
        return self.last((hidden * mask).sum(1) / mask.sum(1))


class Encoder(nn.Module):
    """torch's own transformer layer, whose attention uses weights past any forward."""

    def __init__(self, first=True, freeze=False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 4)
        self.body = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True, norm_first=first)
        self.last = nn.Linear(4, 3)
        if freeze:
            self.tokens.requires_grad_(False)
            self.body.linear1.weight.requires_grad_(False)

    def forward(self, batch):
        mask = batch["mask"]
        hidden = self.body(self.tokens(batch["ids"]), src_key_padding_mask=mask == 0)
        return self.last((hidden * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True))


class Leaky(nn.Module):
    """A mean over padding too: cutting it changes the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.body, self.last = nn.Embedding(11, 4, padding_idx=0), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, batch):
        return self.last(torch.tanh(self.body(self.tokens(batch["ids"]).mean(1))))


class Mixing(nn.Module):
    """Every example is compared with the mean of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, batch):
        hidden = torch.tanh(self.body(batch["x"]))
        return self.last(hidden - 0.3 * hidden.mean(0))


class Pictures(nn.Module):
    """Convolutions, batch norm in eval mode, a scalar of its own, an unused layer, activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.second = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 2, 2)
        self.scale, self.unused, self.last = nn.Parameter(torch.tensor(1.3)), nn.Linear(2, 2), nn.Linear(18, 3)
        self.norm.running_mean.uniform_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, batch):
        x = self.norm(self.conv(batch["image"])).relu_()
        return self.scale * self.last(torch.tanh(self.second(x)).flatten(1))


class Adapter(nn.Module):
    """LoRA: what is trained lies beside what is frozen, and a module is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.a, self.b = nn.Linear(4, 2, bias=False), nn.Linear(2, 6, bias=False)
        for frozen in (*self.base.parameters(), self.last.bias):
            frozen.requires_grad_(False)

    def forward(self, batch):
        return self.last(input=torch.tanh(self.base(batch["x"]) + self.b(self.a(batch["x"]))))


class TimeFirst(nn.Module):
    """Sequences whose first dimension is time."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, batch):
        return self.last(torch.tanh(self.body(batch["sequence"].transpose(0, 1))).mean(0))


def classes(out, batch):
    return F.cross_entropy(out, batch["label"], reduction="none")


def data(n, seed):
    g = torch.Generator().manual_seed(seed)
    mask = (torch.arange(TOKENS) < torch.randint(2, TOKENS, (n, 1), generator=g)).long()
    return {
        "ids": torch.randint(1, 11, (n, TOKENS), generator=g) * mask,
        "mask": mask,
        "x": torch.randn(n, 4, generator=g, dtype=torch.float64),
        "image": torch.randn(n, 1, 6, 6, generator=g, dtype=torch.float64),
        "sequence": torch.randn(n, 3, 3, generator=g, dtype=torch.float64),
        "label": torch.randint(3, (n,), generator=g),
    }


class Items:
    """A dataset whose batches are padded to their own longest, and carry what is no tensor."""

    def __init__(self, n, seed) -> None:
        self.data = data(n, seed)

    def __len__(self) -> int:
        return len(self.data["label"])

    def __getitem__(self, index):
        return {name: tensor[index] for name, tensor in self.data.items()}

    @staticmethod
    def collate(items):
        batch = torch.utils.data.default_collate(items)
        longest = int(batch["mask"].sum(1).max())
        return {**batch, "ids": batch["ids"][:, :longest], "mask": batch["mask"][:, :longest], "what": "sentences"}


MODELS = {
    "tied": Tied,
    "tied, positions of one dimension": lambda: Tied(first=True),
    "encoder": Encoder,
    "frozen": lambda: Encoder(freeze=True),
    "leaky": Leaky,
    "mixing": Mixing,
    "pictures": Pictures,
    "adapter": Adapter,
    "time first": TimeFirst,
}


def problem(model, dataset=False, dtype=torch.float64) -> Problem:
    torch.manual_seed(0)
    made = MODELS[model]().double()
    sets = [Items(17, 1), Items(5, 2)] if dataset else [data(17, 1), data(5, 2)]
    workload = Workload(made, *sets, lambda m, b: m(b), classes, padding="mask")
    return problems.problem(workload, [[0], [5, 9], [16], [2]], dtype=dtype)


def found_rows(way, name, some):
    return some.dense(name, 0, some.shapes[name][0], None, next(iter(way.params.values())))


@pytest.mark.parametrize("dataset", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_each_example_s_gradient_is_what_it_has_alone(model, dataset):
    p = problem(model, dataset)
    with estimating(p.model):
        for function, examples, wide in ((p.model.loss, p.train, False), (p.model.measure, p.evals, True)):
            way = way_to(p.model, function, examples, wide=wide)
            assert way is not None
            seen = []
            for some in way.gradients(range(len(examples)), most=500):
                seen += some.indices
                found = torch.cat([found_rows(way, name, some) for name in some.shapes], dim=1)
                truth = torch.stack([problems.gradient(p.model, function, examples, i) for i in some.indices])
                torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)
            assert sorted(seen) == list(range(len(examples)))


@pytest.mark.parametrize("model", MODELS)
def test_rows_come_in_the_order_that_they_are_asked_for(model):
    p = problem(model)
    asked = [9, 3, 16, 0, 5]
    with estimating(p.model):
        found = [(block, some) for block, some in rows.loss_gradients(p.model, p.train, asked)]
        twice = rows.measure_gradients(p.model, p.evals, [2, 2, 0])
        truth = torch.stack([problems.gradient(p.model, p.model.loss, p.train, i) for i in asked])
        evals = problems.eval_gradients(p)
    assert [i for block, _ in found for i in block] == asked
    torch.testing.assert_close(torch.cat([some for _, some in found]), truth, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(twice, evals[[2, 2, 0]], rtol=1e-9, atol=1e-12)


class Deciding(nn.Module):
    """Asks its data whether there is any padding, as transformers does, which vmap cannot answer for many."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.last = nn.Embedding(11, 4), nn.Linear(4, 3)

    def forward(self, batch):
        mask = batch["mask"].unsqueeze(2)
        hidden = self.tokens(batch["ids"])
        if mask.all():
            return self.last(hidden.mean(1))
        return self.last((hidden * mask).sum(1) / mask.sum(1))


def test_a_small_model_that_vmap_refuses_is_taken_layer_by_layer_and_others_are_not(monkeypatch):
    monkeypatch.setattr(layerwise, "LARGE", 2**20)
    torch.manual_seed(0)
    sets = [data(17, 1), data(5, 2)]
    for some in sets:
        some["mask"][1] = 1  # one without padding among others
    p = problems.problem(
        Workload(Deciding().double(), *sets, lambda m, b: m(b), classes, padding="mask"), [[0], [1, 2]]
    )
    with estimating(p.model):
        assert way_to(p.model, p.model.loss, p.train) is not None
    truth = problems.removal_sums(p) @ problems.eval_gradients(p).T
    torch.testing.assert_close(parse("grad_dot")[0].estimate(p).values, truth, rtol=1e-9, atol=1e-12)
    p = problem("leaky")
    with estimating(p.model):
        assert way_to(p.model, p.model.loss, p.train) is None


def test_only_what_is_proven_exact_is_cut_and_only_what_is_proven_alone_goes_together():
    ways = {}
    for model in MODELS:
        p = problem(model)
        with estimating(p.model):
            ways[model] = way_to(p.model, p.model.loss, p.train)
    assert ways["tied"].cuts is not None
    assert ways["encoder"].cuts is not None
    assert ways["leaky"].cuts is None
    assert {model for model, way in ways.items() if not way.alone} == {"leaky", "adapter"}
    assert "tokens.weight" in ways["tied"].recipe.others  # used past the module's forward
    assert set(ways["pictures"].recipe.others) == {"scale"}
    assert ways["adapter"].recipe.others == []


def test_a_loss_that_padding_changes_by_little_is_not_cut():
    p = problem("tied", dtype=torch.float32)
    plain = p.model._loss
    p.model._loss = lambda out, batch: plain(out, batch) * (1 + 1e-7 * batch["mask"].shape[1])
    with estimating(p.model):
        assert way_to(p.model, p.model.loss, p.train).cuts is None


@pytest.mark.parametrize("entry", ["grad_dot", "grad_cos", "datainf", {"name": "datainf", "damping": 0.3}], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_estimates_are_those_of_rows(model, entry, monkeypatch):
    p = problem(model)
    (estimator,) = parse(entry)
    found = estimator.estimate(p)
    monkeypatch.setattr(layerwise, "LARGE", 2**40)
    torch.testing.assert_close(found.values, estimator.estimate(p).values, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("model", MODELS)
def test_ekfac_is_that_of_rows_on_the_same_factors(model, monkeypatch):
    """Padding has no gradient and no part in E[aaᵀ], so factors of cut batches are those of whole ones."""
    p = problem(model)
    (estimator,) = parse({"name": "ekfac", "damping": 0.05})
    found = estimator.estimate(p)
    monkeypatch.setattr(layerwise, "LARGE", 2**40)
    truth = estimator.estimate(p)
    if model == "mixing":  # A batch's outputs depend on who is in it: the Gauss-Newton matrix does, too.
        return
    assert found.notes["left_out"] == truth.notes["left_out"]
    torch.testing.assert_close(found.values, truth.values, rtol=1e-6, atol=1e-9)


def test_datainf_in_two_passes_and_many_blocks_is_the_same(monkeypatch):
    from fimo.estimators.operators import gradients

    p = problem("tied")
    (estimator,) = parse("datainf")
    truth = estimator.estimate(p).values
    monkeypatch.setattr(gradients, "HELD", 1)
    torch.testing.assert_close(estimator.estimate(p).values, truth, rtol=1e-9, atol=1e-12)


def test_a_training_example_is_differentiated_once_after_its_proof(monkeypatch):
    p = problem("adapter")
    for entry, training in (("grad_dot", 5), ("grad_cos", 5), ("datainf", 17)):
        (estimator,) = parse(entry)
        estimator.estimate(p)  # proves
        counted, plain = [], layerwise.Layerwise.differentiate

        def counting(self, indices, plain=plain, counted=counted):
            counted.extend(indices)
            return plain(self, indices)

        monkeypatch.setattr(layerwise.Layerwise, "differentiate", counting)
        estimator.estimate(p)
        monkeypatch.setattr(layerwise.Layerwise, "differentiate", plain)
        assert len(counted) == training + len(p.evals)


def test_a_proof_is_of_these_examples_and_not_of_others_that_are_given_later():
    p = problem("tied")
    with estimating(p.model):
        assert way_to(p.model, p.model.loss, p.train).cuts is not None
        whole = Examples({**data(17, 1), "mask": torch.ones(17, TOKENS, dtype=torch.long)}, dtype=torch.float64)
        way = way_to(p.model, p.model.loss, whole)
    assert way.examples is whole
    assert way.cuts is None


def test_estimates_repeat_bit_for_bit():
    values = []
    for _ in range(2):
        p = problem("encoder", dtype=torch.float32)
        values.append([parse(name)[0].estimate(p).values for name in ("grad_dot", "datainf", "grad_cos")])
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


def test_the_model_is_as_it_was():
    p = problem("pictures")
    before = {n: t.clone() for n, t in p.model.fixed.items()}
    parse("grad_dot")[0].estimate(p)
    assert all(torch.equal(before[n], t) for n, t in p.model.fixed.items())
    assert not any(m._forward_hooks for m in p.model.module.modules())
    assert isinstance(p.model, FunctionalModel)
