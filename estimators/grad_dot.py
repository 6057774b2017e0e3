"""Grad-Dot: the training gradient as seen by the evaluation gradient, with P = I."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from fimo.estimators.base import Estimate, Hyperparameters, Problem, estimating, finite
from fimo.estimators.operators.gradients import Layout, held_blocks, measure_gradients, removal_gradients
from torch import Tensor


def dot_products(problem: Problem, normalise: bool) -> Tensor:
    """∇g(z)ᵀ Σ_{i∈removal} ∇ℓ_i, float64 (R, E), divided by both norms where asked.

    Costs one backward pass for each evaluation example and each training index that is removed, as long as
    the evaluation gradients fit ``gradients.HELD``; beyond that the training side is computed again for each
    block. A vector of norm 0 gives 0.
    """
    model, evals = problem.model, len(problem.evals)
    values = torch.zeros(len(problem.removals), evals, dtype=torch.float64)
    for columns in held_blocks(evals, Layout.of(model.params).size):
        right = measure_gradients(model, problem.evals, columns)
        for which, left in removal_gradients(problem):
            block = (left @ right.T).double()
            if normalise:
                norms = left.double().norm(dim=1)[:, None] * right.double().norm(dim=1)
                block = torch.where(norms > 0, block / norms, 0)
            values[which.start : which.stop, columns.start : columns.stop] = block.cpu()
    return values


@dataclass(frozen=True)
class GradDot(Hyperparameters):
    """â = ∇g(z, θᶠ)ᵀ ∇L_i(θᶠ): the limit of further training by one small SGD step.

    Source: Charpiat et al., Input similarity from the neural network perspective (2019); TracIn at one
    checkpoint (Pruthi et al. 2020, eq. 3).
    """

    name: ClassVar[str] = "grad_dot"

    def estimate(self, problem: Problem) -> Estimate:
        """(R, E) inner products."""
        with estimating(problem.model):
            return Estimate(finite(dot_products(problem, normalise=False), self.name))
