"""Grad-Dot: the training gradient as seen by the evaluation gradient, with P = I."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fimo.estimators.base import GradientEstimator, Notes, Pairing, Problem
from fimo.estimators.operators.gradients import dot_products


@dataclass(frozen=True)
class GradDot(GradientEstimator):
    """â = ∇g(z, θᶠ)ᵀ ∇L_i(θᶠ): the limit of further training by one small SGD step.

    Source: Charpiat et al., Input similarity from the neural network perspective (2019); TracIn at one checkpoint
    (Pruthi et al. 2020, eq. 3). Cost: one backward pass for each evaluation example and each removed training example.
    """

    name: ClassVar[str] = "grad_dot"

    def pairing(self, problem: Problem, notes: Notes) -> Pairing:
        """Inner products."""
        return Pairing(lambda right: lambda left: dot_products(left, right))
