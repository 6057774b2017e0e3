"""Influence functions as a family: a preconditioner of the evaluation gradients and a training-side gradient.

    â = (P ∇g(z, θᶠ))ᵀ Σ_{i∈removal} r_i

A subclass gives P. The training side r_i is one of (Wei et al., arXiv 2412.03906, Proposition 1)

    final       ∇ℓ_i(θᶠ)
    corrected   ∇ℓ_i(θᶠ) + ∇²ℓ_i(θᶠ) Δθ̂(𝒟)
    further     ∇ℓ_i(θᶠ + Δθ̂(𝒟))

because θᶠ is most often not stationary: by the time that the removal has acted, the parameters have moved by
    Δθ̂(𝒟).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from fimo.estimators.base import JSON, Estimate, Problem, estimating, finite
from fimo.estimators.damping import Damped
from fimo.estimators.operators.gradients import (
    Layout,
    directional,
    held_blocks,
    loss_gradients,
    measure_gradients,
    removal_gradients,
)
from fimo.workers.errors import UsageError
from fimo.workers.examples import Batch
from fimo.workers.functional import Tensors
from torch import Tensor

Preconditioner = Callable[[Tensor], Tensor]
"""Rows (k, P) -> rows (k, P): P applied to each."""

Notes = dict[str, JSON]


@dataclass(frozen=True)
class Influence(Damped):
    """Base of the influence-function estimators.

    Attributes:
        training_gradient: which r_i; see the module.
        displacement_step: the step of the sweep whose mean baseline displacement is Δθ̂(𝒟); None = the
            estimator's own solve, −P ∇L(θᶠ) with L the mean training loss. Not used by ``final``.
    """

    training_gradient: Literal["final", "corrected", "further"] = "final"
    displacement_step: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.displacement_step is None or self.training_gradient != "final",
            "displacement_step needs training_gradient corrected or further",
        )

    @abstractmethod
    def preconditioner(self, problem: Problem, notes: Notes) -> Preconditioner:
        """P at θᶠ; what a reader should know of how it was found goes to ``notes``."""

    def estimate(self, problem: Problem) -> Estimate:
        """(R, E)."""
        notes: Notes = {}
        model, evals = problem.model, len(problem.evals)
        values = torch.zeros(len(problem.removals), evals, dtype=torch.float64)
        with estimating(model):
            precondition = self.preconditioner(problem, notes)
            blocks = held_blocks(evals, Layout.of(model.params).size)
            preconditioned = [(c, precondition(measure_gradients(model, problem.evals, c))) for c in blocks]
            for which, left in self.training_side(problem, precondition):
                for columns, right in preconditioned:
                    values[which.start : which.stop, columns.start : columns.stop] = (left @ right.T).double().cpu()
        return Estimate(finite(values, self.name), notes=notes)

    def training_side(self, problem: Problem, precondition: Preconditioner) -> Iterator[tuple[range, Tensor]]:
        """Σ_{i∈removal} r_i for blocks of removals, rows (b, P)."""
        model = problem.model
        if self.training_gradient == "final":
            return removal_gradients(problem)
        moved = self.displacement(problem, precondition)
        if self.training_gradient == "further":
            return removal_gradients(problem, {n: p + moved[n] for n, p in model.params.items()})

        def with_slope(params: Tensors, batch: Batch) -> Tensor:
            loss, slope = directional(lambda p: model.loss(p, batch), params, moved)
            return loss + slope

        return removal_gradients(problem, loss=with_slope)

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
            return {n: t.squeeze(0) for n, t in layout.tensors(-precondition(total / len(problem.train))).items()}
        kept = problem.displacement or {}
        if step not in kept:
            known = ", ".join(str(s) for s in sorted(kept)) or "none"
            raise UsageError(f"estimator {self.name}: no baseline displacement is kept at step {step} (kept: {known})")
        return {n: kept[step][n].to(p) for n, p in model.params.items()}
