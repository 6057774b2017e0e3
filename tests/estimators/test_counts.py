"""What estimators say that they have to do, and what that costs: counts that grow as the work does."""

from __future__ import annotations

import dataclasses
import math

import pytest

from fimo.estimators import REGISTRY, parse
from fimo.estimators.counts import Work
from fimo.estimators.operators import gradients
from fimo.estimators.rates import Rates
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.start import start_from
from tests.estimators import problems

SETTINGS = FurtherTraining(
    Optimizer("sgd", 0.05),
    10,
    steps=6,
    removal_mode="reweight",
    evaluate=Evaluate(at_steps=(3, 6)),
    precision="float64",
)


def problem(evals=6, **options):
    return problems.classification(evals=evals, further_training=SETTINGS, seeds=(0,), **options)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_work_is_counted_for_every_estimator_and_grows_with_it(name):
    (estimator,) = parse(name)
    few, many = estimator.work(problem()), estimator.work(problem(evals=60))
    total = [sum(dataclasses.astuple(w)) for w in (few, many)]
    assert all(math.isfinite(t) and t > 0 for t in total)
    # Changes are carried forwards once, however many evaluation examples there are.
    assert total[1] > total[0] or name == "unrolled"
    assert 0 < Rates(problem()).seconds(few) < math.inf


@pytest.mark.parametrize("name", ["grad_dot", "datainf", "trak"])
def test_counted_gradients_are_those_that_are_taken(name, monkeypatch):
    p, counted, plain = problem(), 0, gradients.per_example

    def counting(*arguments, **options):
        nonlocal counted
        rows = plain(*arguments, **options)
        counted += len(rows)
        return rows

    (estimator,) = parse(name)
    said = estimator.work(p).gradients
    monkeypatch.setattr(gradients, "per_example", counting)
    estimator.estimate(p)
    assert counted / 2 <= said <= 2 * counted + 27


def test_a_curvature_that_cannot_be_held_is_products_through_the_model(monkeypatch):
    held = parse("cg")[0].work(problem())
    monkeypatch.setattr(gradients, "LARGEST_RANK", 0)
    free = parse("cg")[0].work(problem())
    assert held.gauss == 0 < free.gauss
    assert free.gauss == 100 * 27 * 6


def test_two_pieces_of_work_hold_the_larger_of_their_memories():
    assert Work(passes=1, bytes=5) + Work(passes=2, flops=3, bytes=4) == Work(passes=3, flops=3, bytes=5)


def test_timing_a_step_leaves_no_trace_in_what_is_trained_and_stops_where_training_does():
    p = problem()
    start = start_from(p.model, p.train, p.evals, SETTINGS)
    assert start.graphs == {}
    assert 0 < Rates(dataclasses.replace(p, start=start, replicas=4)).step < math.inf
    assert start.graphs == {}
