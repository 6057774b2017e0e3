"""Influence functions as a family: a preconditioner of the evaluation gradients and a training-side gradient.

    â = (P ∇g(z, θᶠ))ᵀ Σ_{i∈removal} r_i

A subclass gives P. The training side r_i is one of (Wei et al., arXiv 2412.03906, Proposition 1)

    final       ∇ℓ_i(θᶠ)
    corrected   ∇ℓ_i(θᶠ) + ∇²ℓ_i(θᶠ) Δθ̂(𝒟)
    further     ∇ℓ_i(θᶠ + Δθ̂(𝒟))

The latter two exist because θᶠ is most often not stationary: before the removal has acted, the parameters have moved
by Δθ̂(𝒟).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fimo.estimators.base import GradientEstimator, Pair, Pairing, TrainingSide, gradients_of_removals
from fimo.estimators.damping import Damped
from fimo.estimators.declared import families as declared
from fimo.estimators.operators.gradients import Layout, dot_products
from fimo.estimators.operators.rows import loss_gradients
from fimo.estimators.problem import Estimate, Notes, Problem
from fimo.workers.errors import UsageError
from fimo.workers.functional import Tensors

Preconditioner = Callable[[Tensor], Tensor]
"""Rows (k, P) -> rows (k, P): P applied to each; (steps, k, P) if there is a P for each amount."""


@dataclass(frozen=True)
class Influence(declared.Influence, Damped, GradientEstimator):
    """Base of the influence-function estimators."""

    @abstractmethod
    def preconditioning(self, problem: Problem, notes: Notes) -> Preconditioner:
        """P at θᶠ; what a reader should know of how it was made goes to ``notes``."""

    def estimate(self, problem: Problem) -> Estimate:
        """(R, E), or (steps, R, E) if the damping is matched; errors as ``GradientEstimator.estimate``."""
        steps = self.amounts(problem) if problem.further_training is not None else None
        if steps is None or len(steps) == 1 or self.training_gradient == "final" or self.displacement_step is not None:
            return super().estimate(problem)
        # Each amount has a displacement of its own, and so a training side.
        each = [super(Influence, self).estimate(replace(problem, at=(step,))) for step in steps]
        notes: Notes = {"by_step": {str(s): dict(e.notes) for s, e in zip(steps, each, strict=True)}}
        return Estimate(torch.cat([e.values for e in each]), steps, notes)

    def pairing(self, problem: Problem, notes: Notes) -> Pairing:
        """Inner products of r_i with the preconditioned evaluation gradients."""
        precondition, steps = self.preconditioning(problem, notes), self.amounts(problem)

        def against(right: Tensor) -> Pair:
            preconditioned = precondition(right)
            if steps is None:
                return lambda left: dot_products(left, preconditioned)
            return lambda left: torch.stack([dot_products(left, of_step) for of_step in preconditioned])

        side = self.training_side(problem, precondition)
        return Pairing(against, side, steps, self.rows_kept(1 if steps is None else len(steps)))

    def rows_kept(self, systems: int) -> int:
        """Rows of P scalars kept for each evaluation gradient while so many systems are solved for it."""
        return systems

    def training_side(self, problem: Problem, precondition: Preconditioner) -> TrainingSide:
        """Σ_{i∈removal} r_i for blocks of removals, rows (b, P)."""
        if self.training_gradient == "final":
            return partial(gradients_of_removals, problem)
        model, moved = problem.model, self.displacement(problem, precondition)
        if self.training_gradient == "further":
            return partial(gradients_of_removals, problem, {n: p + moved[n] for n, p in model.params.items()})

        return partial(gradients_of_removals, problem, along=moved)

    def displacement(self, problem: Problem, precondition: Preconditioner) -> Tensors:
        """Δθ̂(𝒟) by parameter name.

        Raises:
            UsageError: the sweep keeps no displacement at ``displacement_step``.
        """
        model, step = problem.model, self.displacement_step
        if step is None:
            layout = Layout.of(model.params)
            total = torch.zeros(1, layout.size, dtype=model.dtype, device=model.device)
            for _, rows in loss_gradients(model, problem.train):
                total += rows.sum(dim=0)
            solved = -precondition(total / len(problem.train))
            return layout.tensors(solved.reshape(layout.size))
        kept = problem.displacement or {}
        if step not in kept:
            known = ", ".join(str(s) for s in sorted(kept)) or "none"
            raise UsageError(f"estimator {self.name}: no baseline displacement is kept at step {step} (kept: {known})")
        return {n: kept[step][n].to(p) for n, p in model.params.items()}
