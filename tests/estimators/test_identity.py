"""What an estimator says its values depend on is what they depend on: kept estimates are found again by it."""

from __future__ import annotations

import dataclasses

import pytest

from fimo.estimators import REGISTRY, parse
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from tests.estimators import problems

SETTINGS = FurtherTraining(Optimizer("sgd", 0.05), 10, steps=4, evaluate=Evaluate(at_steps=(2, 4)), precision="float64")
CHANGES = {
    "rate": {"optimizer": Optimizer("sgd", 0.02)},
    "momentum": {"optimizer": Optimizer("sgd", 0.05, momentum=0.9)},
    "batch size": {"batch_size": 8},
    "removal mode": {"removal_mode": "mask"},
    "evaluation": {"evaluate": Evaluate(at_steps=(1, 4))},
}
OPTIONS = {
    "cg": {"damping": 0.1, "max_iterations": 5},
    "lissa": {"damping": 0.1, "depth": 5, "scale": 20},
    "lissa_h": {"damping": 0.1, "depth": 5, "scale": 20},
    "trak": {"dimension": 6},
}


def values(estimator, settings, seeds):
    return estimator.estimate(problems.classification(further_training=settings, seeds=seeds)).values


def differs(a, b):
    return a.shape != b.shape or not bool((a == b).all())


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_values_that_follow_training_or_seeds_are_declared_to(name):
    (estimator,) = parse({"name": name, **OPTIONS.get(name, {})})
    assert type(estimator).version >= 1
    plain = values(estimator, SETTINGS, (0, 1))
    changed = {
        what: differs(values(estimator, dataclasses.replace(SETTINGS, **change), (0, 1)), plain)
        for what, change in CHANGES.items()
    }
    assert any(changed.values()) == estimator.follows_training(), changed
    of_seeds = differs(values(estimator, SETTINGS, (0, 2)), plain)
    assert of_seeds == (estimator.follows_seeds((0, 1)) != estimator.follows_seeds((0, 2)))
    assert estimator.follows_training() or not estimator.follows_seeds((0, 1))


def test_only_the_seeds_averaged_over_count():
    (estimator,) = parse({"name": "unrolled", "seeds": 1})
    assert estimator.follows_seeds((4, 5, 6)) == estimator.follows_seeds((0, 6)) == (7,)
    assert not differs(values(estimator, SETTINGS, (4, 5)), values(estimator, SETTINGS, (4, 9)))


@pytest.mark.parametrize("name", sorted(n for n in REGISTRY if "displacement_step" in parse(n)[0].params()))
def test_a_displacement_follows_training_and_every_seed(name):
    (estimator,) = parse({"name": name, "training_gradient": "further", "displacement_step": 2})
    assert estimator.follows_training()
    assert estimator.follows_seeds((3, 4)) == (3, 4)
