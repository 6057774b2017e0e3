"""Estimators that follow single runs give the effects of the sweep's removal weight, and the others know of none."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fimo.estimators import parse
from fimo.workers.settings import Optimizer
from tests.estimators import problems
from tests.estimators.test_unrolled import gold_standard, settings_for

OPTIMIZERS = {"sgd": Optimizer("sgd", 0.05, momentum=0.5), "adamw": Optimizer("adamw", 0.002, weight_decay=0.1)}
EVERY = [[0], [5], [26], [7], [41], [90], [133], [2, 3]]


def problem(optimizer: str, weight: float, **options):
    chosen = dataclasses.replace(
        settings_for(), optimizer=OPTIMIZERS[optimizer], batch_size=60, removal_weight=weight, **options
    )
    return problems.regression(further_training=chosen, seeds=(3,), n=250, removals=EVERY, replicas=7)


def values(p, name: str, **options) -> torch.Tensor:
    (estimator,) = parse({"name": name, **options})
    return estimator.estimate(p).values


def truth(p) -> torch.Tensor:
    return gold_standard(p, 3) / p.further_training.removal_weight


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_unrolled_is_the_first_order_of_the_effect_of_that_weight(optimizer: str) -> None:
    heavy, light = problem(optimizer, 30.0), problem(optimizer, 1.0)
    expected, found, other = truth(heavy), values(heavy, "unrolled"), values(light, "unrolled")
    assert problems.columns_cosine(found[-1], expected[-1]).min() > 0.95
    assert off(other, truth(light)) < 0.05
    if optimizer == "sgd":
        # Linear: one change for every weight. What is left is second order in 30/250.
        torch.testing.assert_close(found, other, rtol=1e-9, atol=1e-13)
        assert off(found, expected) < 0.2
        adjoint = values(heavy, "unrolled", direction="adjoint")
        torch.testing.assert_close(adjoint, found, rtol=1e-8, atol=1e-13)
    else:
        assert off(found, expected) < 0.1
        assert off(found, expected) < off(other, expected) / 4, "a lighter removal's is another"


def test_unrolled_through_clipping_carries_the_weight_too() -> None:
    heavy = problem("sgd", 30.0, clip_norm=0.2)
    expected, found = truth(heavy), values(heavy, "unrolled")
    other = values(problem("sgd", 1.0, clip_norm=0.2), "unrolled")
    assert off(found, expected) < min(0.15, off(other, expected))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_mirrored_agrees_with_further_training_of_that_weight_in_size_too(optimizer: str) -> None:
    heavy = problem(optimizer, 30.0)
    found, expected = values(heavy, "mirrored", seeds=1), truth(heavy)
    assert problems.columns_cosine(found[-1], expected[-1]).mean() > 0.9
    assert 0.5 < float(found[-1].norm() / expected[-1].norm()) < 2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["grad_dot", "grad_cos", "cg", "lissa", "trak", "ekfac", "datainf"])
def test_the_others_are_derivatives_and_do_not_change(name: str, optimizer: str) -> None:
    heavy, light = problem(optimizer, 30.0), problem(optimizer, 1.0)
    torch.testing.assert_close(values(heavy, name), values(light, name), rtol=0, atol=0)


def test_factors_of_an_amount_do_not_change() -> None:
    torch.testing.assert_close(*(values(problem("sgd", w), "ekfac_matched") for w in (30.0, 1.0)), rtol=0, atol=0)
