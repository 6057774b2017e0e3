"""The amount-matched recursion against the dense filter, which it is over full batches, and its two ends."""

from __future__ import annotations

import pytest
import torch

from fimo.estimators import parse
from fimo.estimators.ekfac_matched import spectral_filter
from fimo.estimators.operators import gradients
from fimo.workers.errors import DivergedError, UsageError
from fimo.workers.settings import FurtherTraining, Optimizer
from tests.estimators import problems
from tests.estimators.test_ekfac_matched import estimate, training


def test_one_step_is_the_learning_rate_times_grad_dot():
    p = problems.classification(further_training=training(1))
    found = estimate("lissa_matched", p)
    assert found.steps == (1,)
    torch.testing.assert_close(found.values[0], 0.05 * estimate("grad_dot", p).values, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("held", [None, 900], ids=["compressed", "matrix free and in blocks"])
def test_over_full_batches_it_is_the_dense_filter(held, monkeypatch):
    if held is not None:
        monkeypatch.setattr(gradients, "HELD", held)
    p = problems.regression(further_training=training(40, at=(3, 40), batch_size=27, momentum=0.5))
    values, vectors = torch.linalg.eigh(problems.gauss_newton(p))
    filters, _ = spectral_filter(values, p.further_training.optimizer, (3, 40))
    found = estimate("lissa_matched", p)
    assert found.steps == (3, 40)
    for row, values in zip(filters, found.values, strict=True):
        truth = problems.removal_sums(p) @ (vectors * row) @ vectors.T @ problems.eval_gradients(p).T
        torch.testing.assert_close(values, truth, rtol=1e-8, atol=1e-11)


def test_it_refuses_what_it_cannot_follow():
    for settings, words in [
        (None, "further_training"),
        (training(3, name="adam"), "SGD alone, not adam"),
        (FurtherTraining(Optimizer("sgd", 0.1), 10, steps=3, clip_norm=1.0), "clip_norm"),
    ]:
        p = problems.classification(further_training=settings)
        with pytest.raises(UsageError, match=words):
            estimate("lissa_matched", p)
        assert not parse("lissa_matched")[0].applies(p)


def test_a_learning_rate_too_large_is_an_error():
    p = problems.regression(further_training=training(400, lr=50.0))
    with pytest.raises(DivergedError, match="learning rate"):
        estimate("lissa_matched", p)
