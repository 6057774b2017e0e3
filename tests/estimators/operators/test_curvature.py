"""Curvature operators, compressed and not, against dense matrices."""

from __future__ import annotations

import pytest
import torch

from fimo.estimators.differentiable import estimating
from fimo.estimators.operators.curvature import GaussNewton, Hessian
from fimo.estimators.operators.spaces import Compressed, MatrixFree
from tests.estimators import problems

KINDS = [problems.classification, problems.regression]


@pytest.mark.parametrize("kind", KINDS)
def test_operators_are_the_mean_over_all_examples_not_over_blocks(kind):
    p = kind()
    rows = problems.eval_gradients(p)
    with estimating(p.model):
        g, h = GaussNewton(p.model, p.train), Hessian(p.model, p.train)
        truth = problems.gauss_newton(p)
        torch.testing.assert_close(g(rows), rows @ truth, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(h(rows), rows @ problems.hessian(p), rtol=1e-9, atol=1e-12)
        space = Compressed(g).around(rows)
        torch.testing.assert_close(space.rows(space.start), rows, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(space.rows(space.apply(space.start)), rows @ truth, rtol=1e-9, atol=1e-12)
        some = [3, 4, 11, 26, 19, 0, 1, 2, 7, 8]
        plain = MatrixFree(g).around(rows)
        torch.testing.assert_close(
            space.rows(space.apply(space.start, some)), plain.rows(plain.apply(rows, some)), rtol=1e-9, atol=1e-12
        )
