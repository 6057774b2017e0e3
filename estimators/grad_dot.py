"""Grad-Dot: the training gradient as seen by the evaluation gradient, with P = I, or the optimizer's own scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fimo.estimators.amounts import NEEDS_TRAINING, linear, settings_of
from fimo.estimators.base import GradientEstimator, Layered, Pair, Pairing
from fimo.estimators.counts import Work
from fimo.estimators.declared import shipped as declared
from fimo.estimators.matching import inverse_scale, of_scale
from fimo.estimators.operators import products
from fimo.estimators.operators.gradients import dot_products
from fimo.estimators.operators.products import Sides
from fimo.estimators.problem import Notes, Problem


@dataclass(frozen=True)
class GradDot(declared.GradDot, GradientEstimator):
    """â = ∇g(z, θᶠ)ᵀ ∇L_i(θᶠ): the limit of further training by one small SGD step.

    Source: Charpiat et al., Input similarity from the neural network perspective (2019); TracIn at one checkpoint
    (Pruthi et al. 2020, eq. 3). Cost: one backward pass for each evaluation example and each removed training example;
    with the optimizer's scale the gradients of an epoch of batches too.
    """

    by_layers: ClassVar[bool] = True

    def unsuited(self, problem: Problem) -> str | None:
        """The optimizer has no scale of its own."""
        if self.preconditioner is None:
            return None
        if problem.further_training is None:
            return f"the optimizer's scale {NEEDS_TRAINING}"
        if linear(problem.further_training.optimizer):
            return "sgd has no scale of its own: leave preconditioner out"
        return None

    def work(self, problem: Problem) -> Work:
        """Beside the gradients, whole epochs of batches for the optimizer's scale."""
        if self.preconditioner is None:
            return super().work(problem)
        return super().work(problem) + of_scale(problem)

    def pairing(self, problem: Problem, notes: Notes) -> Pairing:
        """Inner products, in the optimizer's scale or as they are."""
        if self.preconditioner is None:
            return Pairing(lambda right: lambda left: dot_products(left, right))
        scale = inverse_scale(problem, settings_of(self, problem))

        def against(right: Tensor) -> Pair:
            scaled = right * scale.to(right)
            return lambda left: dot_products(left, scaled)

        return Pairing(against)

    def layered(self, problem: Problem, notes: Notes, both: Sides) -> Layered:
        """The same, layer by layer."""
        scale = None if self.preconditioner is None else inverse_scale(problem, settings_of(self, problem))
        return Layered(lambda left, right: products.dot_products(left, right, both.like, scale))
