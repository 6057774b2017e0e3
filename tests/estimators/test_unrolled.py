"""Unrolled further training against the gold standard's own loop, and forward against adjoint."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from fimo.estimators import parse
from fimo.workers.errors import UsageError
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.further_training import further_train
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.start import start_from
from fimo.workers.workload import Workload
from tests.estimators import problems

OPTIMIZERS = {
    "sgd": Optimizer("sgd", 0.05),
    "momentum": Optimizer("sgd", 0.02, momentum=0.9, nesterov=True, weight_decay=0.01),
    "dampened": Optimizer("sgd", 0.05, momentum=0.5, dampening=0.3),
    "adam": Optimizer("adam", 0.002, weight_decay=0.01),
    "adamw": Optimizer("adamw", 0.002, weight_decay=0.1, amsgrad=True),
}


def settings_for(optimizer="sgd", mode="reweight", **options):
    chosen = {"steps": 8, "evaluate": Evaluate(at_steps=(1, 3, 8)), "precision": "float64", **options}
    return FurtherTraining(OPTIMIZERS[optimizer], 10, removal_mode=mode, **chosen)


def gold_standard(p, seed, removals=None):
    """Effects (T, R, E) of the sweep's own loop."""
    whole = start_from(p.model, p.train, p.evals, p.further_training)
    lanes = [(), *(tuple(r) for r in (removals or p.removals))]
    deltas = further_train(whole, lanes, seed).deltas
    return (deltas[1:] - deltas[:1]).transpose(0, 1)


def estimate(p, **options):
    (estimator,) = parse({"name": "unrolled", **options})
    return estimator.estimate(p)


CASES = [("reweight", "momentum"), ("drop", "momentum"), ("mask", "dampened"), ("drop", "sgd")]


@pytest.mark.parametrize(("mode", "optimizer"), CASES)
def test_forward_and_adjoint_are_the_same_sum(mode, optimizer):
    p = problems.classification(further_training=settings_for(optimizer, mode), seeds=(3, 4))
    forward, adjoint = (estimate(p, direction=d) for d in ("forward", "adjoint"))
    assert forward.steps == adjoint.steps == (1, 3, 8)
    torch.testing.assert_close(forward.values, adjoint.values, rtol=1e-8, atol=1e-13)
    assert forward.values.abs().max() > 0


@pytest.mark.parametrize("mode", ["reweight", "mask", "drop"])
@pytest.mark.parametrize(
    ("optimizer", "clip"), [("sgd", None), ("momentum", None), ("adam", None), ("adamw", 0.2), ("sgd", 0.2)]
)
def test_it_is_the_first_order_of_the_gold_standard(mode, optimizer, clip):
    # Five batches, the last of 10. Adam's first step is all but a sign, clipped gradients cross the bound.
    settings = dataclasses.replace(settings_for(optimizer, mode, clip_norm=clip), batch_size=60)
    p = problems.regression(further_training=settings, seeds=(3,), n=250)
    truth, found = gold_standard(p, 3), estimate(p).values
    assert (found - truth).norm() < (0.01 if "adam" in optimizer or clip else 0.04) * truth.norm()


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_halving_the_perturbation_quarters_the_difference(optimizer):
    """A removal of reweight twice as light: two halves of one example, 𝒟 given twice over, of which one leaves."""
    errors = []
    for copies in (1, 2, 4):
        base = problems.classification(n=20)
        tensors = {k: v.repeat(copies, *[1] * (v.dim() - 1)) for k, v in base.train.tensors.items()}
        train = Examples(tensors, dtype=torch.float64)
        # Full batches: 𝒟 repeated is the same loss, and a removal weighs 1/(20·copies).
        settings = dataclasses.replace(settings_for(optimizer), batch_size=20 * copies)
        p = type(base)(base.model, train, base.evals, [[0], [5], [7]], further_training=settings, seeds=(1,))
        errors.append((estimate(p).values[-1] - gold_standard(p, 1)[-1]).norm())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.15)


def test_a_group_is_the_sum_of_its_members():
    settings = settings_for("momentum")
    p = problems.classification(removals=[[1], [2], [1, 2]], further_training=settings, seeds=(0,))
    found = estimate(p).values
    torch.testing.assert_close(found[:, 2], found[:, 0] + found[:, 1], rtol=1e-9, atol=1e-14)


def test_seeds_are_averaged_and_last_step_only_cuts():
    p = problems.classification(further_training=settings_for(), seeds=(3, 4))
    both = estimate(p)
    single = [estimate(dataclasses.replace(p, seeds=(s,))).values for s in (3, 4)]
    torch.testing.assert_close(both.values, (single[0] + single[1]) / 2)
    assert not torch.allclose(single[0], single[1])
    cut = estimate(p, last_step=3, seeds=1)
    assert cut.steps == (1, 3)
    torch.testing.assert_close(cut.values, single[0][:2])


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x)


def with_model(model, **options):
    base = problems.classification()
    workload = Workload(
        model.double(), base.train.tensors, base.evals.tensors, problems.outputs_x, problems.cross_entropy
    )
    return problems.problem(workload, [[0], [5], [1, 2]], **options)


@pytest.mark.parametrize("mode", ["reweight", "mask"])
@pytest.mark.parametrize("direction", ["forward", "adjoint"])
def test_dropout_draws_what_the_sweep_draws_and_leaves_the_callers_random_state(mode, direction):
    torch.manual_seed(0)
    p = with_model(Dropping(), further_training=settings_for("sgd", mode), seeds=(3,))
    before = torch.random.get_rng_state()
    found = estimate(p, direction=direction).values
    assert torch.equal(torch.random.get_rng_state(), before)
    truth = gold_standard(p, 3)
    assert (found - truth).norm() < 0.05 * truth.norm()


@pytest.mark.parametrize(("optimizer", "directions"), [("momentum", ("forward", "adjoint")), ("adam", ("forward",))])
def test_memory_forces_blocks_of_removals_or_evaluation_examples(optimizer, directions, monkeypatch):
    p = problems.classification(further_training=settings_for(optimizer), seeds=(3,))
    whole = estimate(p).values
    monkeypatch.setattr("fimo.estimators.operators.gradients.HELD", 4 * 117 * 5)
    monkeypatch.setattr("fimo.estimators.operators.gradients.STREAM", 117)
    for direction in directions:
        torch.testing.assert_close(estimate(p, direction=direction).values, whole, rtol=1e-8, atol=1e-13)


def test_it_trains_with_seeds_of_its_own_unless_it_is_told_otherwise():
    (plain,), (two,), (own,) = (parse({"name": "unrolled", **o}) for o in ({}, {"seeds": 2}, {"own_seeds": True}))
    assert plain.runs((0, 1)) == (2, 3)
    assert plain.runs((7, 3)) == (8, 9)
    assert plain.runs(range(100)) == (100, 101, 102, 103)
    assert plain.runs(()) == ()
    assert two.runs((5,)) == (6, 7)
    assert own.runs(range(10, 20)) == (10, 11, 12, 13)
    assert all(e.follows_seeds((4, 5, 6)) == e.runs((4, 5, 6)) for e in (plain, two, own))


def test_only_the_wanted_steps_are_estimated():
    p = problems.classification(further_training=settings_for("adam"), seeds=(3,))
    whole, some = estimate(p), estimate(dataclasses.replace(p, at=(3,)))
    assert some.steps == (3,)
    torch.testing.assert_close(some.values[0], whole.values[1])


def test_what_cannot_be_followed_is_refused_in_one_line():
    norm = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    p = with_model(norm, further_training=settings_for(), seeds=(0,))
    with pytest.raises(UsageError, match="mode: eval"):
        estimate(p)
    evaluated = with_model(norm, further_training=settings_for(mode="reweight", precision="float64"), seeds=(0,))
    settings = dataclasses.replace(evaluated.further_training, mode="eval")
    assert estimate(dataclasses.replace(evaluated, further_training=settings)).values.isfinite().all()
    p = with_model(Dropping(), further_training=settings_for(mode="drop"), seeds=(0,))
    with pytest.raises(UsageError, match="drop mode dropout"):
        estimate(p)
    p = problems.classification(n=21, removals=[[0]], further_training=settings_for(mode="drop"), seeds=(0,))
    with pytest.raises(UsageError, match="shortens the epoch"):
        estimate(p)
    for settings, what in ((settings_for("adam"), "not adam"), (settings_for(clip_norm=1.0), "not clipped gradients")):
        with pytest.raises(UsageError, match=f"unclipped SGD alone, {what}; leave direction out"):
            estimate(problems.classification(further_training=settings, seeds=(0,)), direction="adjoint")
        assert estimate(problems.classification(further_training=settings, seeds=(0,))).notes["direction"] == "forward"
    with pytest.raises(UsageError, match="at least one"):
        estimate(problems.classification(further_training=settings_for()))
    with pytest.raises(UsageError, match="further_training"):
        estimate(problems.classification(seeds=(0,)))


def test_the_model_is_untouched_after_an_error(monkeypatch):
    p = problems.classification(further_training=settings_for(), seeds=(0,))
    before = {n: t.clone() for n, t in p.model.params.items()}
    p.model.module.train()

    def broken(*arguments):
        raise RuntimeError("no measure")

    monkeypatch.setattr(FunctionalModel, "measure", broken)
    with pytest.raises(RuntimeError, match="no measure"):
        estimate(p)
    assert p.model.module.training
    assert all(torch.equal(t, before[n]) for n, t in p.model.params.items())
