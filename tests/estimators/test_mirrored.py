"""The estimator over mirrored further training: seeds, steps, refusals, and what it is worth against the sweep."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from fimo.estimators import parse
from fimo.workers.errors import DivergedError, UsageError
from fimo.workers.mirror import train_mirrored
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.stacking import replay
from fimo.workers.start import Start, start_from
from fimo.workers.workload import Workload
from tests.estimators import problems
from tests.estimators.test_unrolled import gold_standard


@pytest.fixture(autouse=True)
def untraced(monkeypatch):
    """Traces cost more than these few steps; the workers' tests have them."""
    monkeypatch.setattr(replay, "AFTER", 10**9)


def settings(optimizer: Optimizer | None = None, **options) -> FurtherTraining:
    chosen = {"steps": 8, "evaluate": Evaluate(at_steps=(1, 3, 8)), "precision": "float64", **options}
    return FurtherTraining(optimizer or Optimizer("sgd", 0.05), 10, **chosen)


def mirrored(**options):
    (estimator,) = parse({"name": "mirrored", **options})
    return estimator


def truth_of(p, seed: int) -> torch.Tensor:
    start = start_from(p.model, p.train, p.evals, dataclasses.replace(p.further_training, removal_mode="reweight"))
    return train_mirrored(start, p.evals, p.removals, seed, (1, 3, 8), 2).values


def test_its_runs_have_seeds_after_the_sweep_s_and_the_digest_follows_them():
    assert mirrored().runs(range(3, 5)) == (5, 6, 7, 8)
    assert mirrored(seeds=2).runs((0, 9)) == (10, 11)
    assert mirrored(seeds=None).runs((0, 1, 2)) == (3, 4, 5)
    assert mirrored(seeds=2, own_seeds=True).runs((4, 5, 6)) == (4, 5)
    assert mirrored(own_seeds=True).runs((4, 5)) == (4, 5)
    for options in ({}, {"own_seeds": True}):
        assert mirrored(**options).follows_seeds((0, 1)) == mirrored(**options).runs((0, 1))
    assert mirrored().follows_seeds((0, 1)) != mirrored().follows_seeds((0, 1, 2))
    assert mirrored().params() == {"seeds": 4, "own_seeds": False, "last_step": None}
    assert mirrored().follows_training()


def test_seeds_are_averaged_as_they_are_given_and_last_step_cuts():
    p = problems.classification(further_training=settings(), seeds=(3, 4, 5), replicas=2)
    single = [truth_of(p, seed) for seed in (3, 4)]
    found = mirrored(seeds=2).estimate(p)
    assert found.steps == (1, 3, 8)
    torch.testing.assert_close(found.values, (single[0] + single[1]) / 2, rtol=1e-9, atol=1e-13)
    cut = mirrored(last_step=3, seeds=1).estimate(p)
    assert cut.steps == (1, 3)
    torch.testing.assert_close(cut.values, single[0][:2], rtol=1e-9, atol=1e-13)
    at = mirrored(seeds=1).estimate(dataclasses.replace(p, at=(3,)))
    assert at.steps == (3,)
    torch.testing.assert_close(at.values, single[0][1:2], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("mode", ["reweight", "mask", "drop"])
def test_it_estimates_the_sweep_in_every_removal_mode_and_group_and_sign(mode):
    removals = [[i] for i in range(9)] + [[1, 2, 3]]
    p = problems.classification(
        n=40, removals=removals, further_training=settings(removal_mode=mode), seeds=range(6), replicas=7
    )
    found = mirrored(seeds=6).estimate(p).values
    torch.testing.assert_close(found[:, 9], found[:, 1:4].sum(dim=1), rtol=1e-9, atol=1e-13)
    truth = torch.stack([gold_standard(p, seed) for seed in range(6)]).mean(dim=0)
    assert problems.columns_cosine(found[2], truth[2]).mean() > (0.9 if mode == "reweight" else 0.5)


def test_the_start_and_the_stack_that_it_is_given_are_used(monkeypatch):
    p = problems.classification(further_training=settings(removal_mode="drop"), seeds=(3,), replicas=7)
    expected = mirrored().estimate(p).values
    start = start_from(p.model, p.train, p.evals, p.further_training)
    used = []

    def spy(start: Start, evals, removals, seed, steps, replicas):
        used.append((start.engine, replicas))
        return train_mirrored(start, evals, removals, seed, steps, replicas)

    monkeypatch.setattr("fimo.estimators.mirrored.train_mirrored", spy)
    engine = dataclasses.replace(start.engine, replay=False, fold=False)
    given = dataclasses.replace(p, start=start.using(engine), replicas=3)
    torch.testing.assert_close(mirrored().estimate(given).values, expected, rtol=1e-9, atol=1e-13)
    assert used == [(engine, 3)]


class Counting(nn.Module):
    """Writes to a buffer in training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen += 1
        return self.layer(x)


def with_model(model, measure=None, **options):
    base = problems.classification()
    workload = Workload(
        model.double(), base.train.tensors, base.evals.tensors, problems.outputs_x, problems.cross_entropy, measure
    )
    return problems.problem(workload, [[0], [5], [1, 2]], **options)


def test_what_it_means_nothing_for_is_named_in_one_line():
    norm = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    accuracy = lambda outputs, batch: (outputs.argmax(dim=1) == batch["label"]).double()  # noqa: E731
    plain = {"further_training": settings(), "seeds": (0,), "replicas": 2}
    cases = {
        "further_training": problems.classification(seeds=(0,)),
        "at least one seed": problems.classification(further_training=settings()),
        "batch norm": with_model(norm, further_training=settings(removal_mode="mask"), seeds=(0,)),
        "'seen'": with_model(Counting(), **plain),
        "no gradient": with_model(nn.Linear(4, 3), accuracy, **plain),
    }
    for words, p in cases.items():
        reason = mirrored().unsuited(p)
        assert words in reason
        assert "\n" not in reason
        with pytest.raises(UsageError, match=words):
            mirrored().estimate(p)
    assert mirrored().refuses(problems.classification(**plain)) is None
    frozen = with_model(norm, further_training=settings(removal_mode="mask", mode="eval"), seeds=(0,), replicas=2)
    assert mirrored(seeds=1).estimate(frozen).values.isfinite().all()
    for wrong in ({"seeds": 0}, {"last_step": 0}):
        with pytest.raises(UsageError, match="at least 1"):
            mirrored(**wrong)
    late = problems.classification(at=(3,), **plain)
    with pytest.raises(UsageError, match="before the first recorded step, 3"):
        mirrored(last_step=2).estimate(late)


def test_a_run_that_diverges_is_no_estimate():
    p = problems.regression(further_training=settings(Optimizer("sgd", 1e200)), seeds=(0,), replicas=2)
    with pytest.raises(DivergedError, match="not finite after step"):
        mirrored().estimate(p)
