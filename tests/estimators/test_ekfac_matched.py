"""The amount-matched filter against its closed form, torch's own SGD, and its two limits."""

from __future__ import annotations

import pytest
import torch

from fimo.estimators import parse
from fimo.estimators.ekfac_matched import spectral_filter
from fimo.workers.errors import UsageError
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from tests.estimators import problems


def training(steps, at=None, batch_size=10, **optimizer):
    options = {"name": "sgd", "lr": 0.05, **optimizer}
    return FurtherTraining(Optimizer(**options), batch_size, steps=steps, evaluate=Evaluate(at_steps=at or (steps,)))


def estimate(entry, problem):
    (estimator,) = parse(entry)
    return estimator.estimate(problem)


def test_the_filter_of_plain_sgd_is_its_closed_form():
    values = torch.tensor([0.0, 1e-6, 0.01, 1.0, 20.0], dtype=torch.float64)
    found, saturated = spectral_filter(values, Optimizer("sgd", 0.05), (1, 7, 300))
    for t, row in zip((1, 7, 300), found, strict=True):
        closed = torch.where(values > 0, (1 - (1 - 0.05 * values) ** t) / values, t * 0.05)
        torch.testing.assert_close(row, closed, rtol=1e-8, atol=1e-12)
    assert saturated == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.5, "dampening": 0.3, "weight_decay": 0.1},
    ],
)
def test_the_filter_is_what_torchs_sgd_does_to_a_quadratic(options):
    values = torch.tensor([0.0, 0.01, 1.0, 8.0], dtype=torch.float64)
    x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.05, **options)
    steps, truth = (1, 2, 17), []
    for step in range(1, 18):
        optimizer.zero_grad()
        (0.5 * (values * x**2).sum() - x.sum()).backward()
        optimizer.step()
        if step in steps:
            truth.append(x.detach().clone())
    found, _ = spectral_filter(values, Optimizer("sgd", 0.05, **options), steps)
    torch.testing.assert_close(found, torch.stack(truth), rtol=1e-10, atol=1e-12)


def test_an_eigenvalue_too_large_for_the_rate_gets_its_limit():
    found, saturated = spectral_filter(torch.tensor([100.0], dtype=torch.float64), Optimizer("sgd", 0.05), (1, 50))
    assert saturated == 1
    assert found[1, 0] == pytest.approx(0.01)


def test_one_step_is_the_learning_rate_times_grad_dot():
    p = problems.classification(further_training=training(1))
    found = estimate("ekfac_matched", p)
    assert found.steps == (1,)
    torch.testing.assert_close(found.values[0], 0.05 * estimate("grad_dot", p).values, rtol=1e-8, atol=1e-12)


def test_many_steps_are_the_influence_function_and_few_are_grad_dot():
    settings = training(5000, at=(2, 5000), lr=0.1, weight_decay=0.05)
    p = problems.regression(further_training=settings)
    found = estimate("ekfac_matched", p)
    influence = estimate({"name": "ekfac", "damping": 0.05}, p).values
    torch.testing.assert_close(found.values[1], influence, rtol=1e-6, atol=1e-9)
    tiny = problems.regression(further_training=training(2, lr=1e-6))
    found = estimate("ekfac_matched", tiny).values[0]
    torch.testing.assert_close(found, 2e-6 * estimate("grad_dot", tiny).values, rtol=1e-3, atol=1e-12)


def test_it_refuses_what_it_cannot_follow():
    for settings, words in [
        (None, "further_training"),
        (training(3, name="adam"), "SGD alone, not adam"),
        (FurtherTraining(Optimizer("sgd", 0.1), 10, steps=3, clip_norm=1.0), "clip_norm"),
    ]:
        p = problems.classification(further_training=settings)
        with pytest.raises(UsageError, match=words):
            estimate("ekfac_matched", p)
        assert not parse("ekfac_matched")[0].applies(p)
