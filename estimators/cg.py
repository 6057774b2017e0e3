"""Influence by conjugate gradients: P = (C + λI)⁻¹, C the Gauss-Newton matrix or the Hessian of the mean loss.

Source: Martens, Deep learning via Hessian-free optimization (2010), for CG on curvature products; Koh and
Liang (2017), section 3, for influence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypedDict, cast

import torch
from torch import Tensor

from fimo.estimators.base import JSON, Notes, Problem, flat_loss
from fimo.estimators.influence import Influence, Preconditioner
from fimo.estimators.operators.spaces import Space, make_curvature
from fimo.workers.errors import DivergedError

UNSOLVED = 1000
"""How many times the tolerance a true residual may be before the reader is warned."""

MAGNIFIED = 1.0
"""Part of a gradient that its rounding may become, magnified by the condition number, before the reader is warned."""


@dataclass(frozen=True)
class CG(Influence):
    """(C + λI)⁻¹ ∇g by conjugate gradients, all evaluation examples of a block together.

    Iterates, inner products and residuals are float64 whatever the model's dtype, because a small damping magnifies
    their rounding. A true residual far above the tolerance is in the notes as a warning.

    Attributes:
        curvature: ``gauss_newton`` (positive semidefinite for convex losses) or ``hessian`` (may be
            indefinite; CG then still solves the system, but without its guarantee: look at the residuals in
            the notes).
        tolerance: a right-hand side stops at ‖v − (C + λI)x‖ ≤ tolerance·‖v‖.
        max_iterations: and at the latest after so many.

    Cost: an iteration is a product with C for every right-hand side; see ``spaces`` for when that is cheap.
    """

    name: ClassVar[str] = "cg"

    curvature: Literal["gauss_newton", "hessian"] = "gauss_newton"
    tolerance: float = 1e-8
    max_iterations: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.tolerance < 1, "tolerance must lie between 0 and 1")
        self.require(self.max_iterations >= 1, "max_iterations must be at least 1")

    def unsuited(self, problem: Problem) -> str | None:
        """The Gauss-Newton matrix is 0."""
        return super().unsuited(problem) or (flat_loss(problem) if self.curvature == "gauss_newton" else None)

    def preconditioner(self, problem: Problem, notes: Notes) -> Preconditioner:
        """(C + λI)⁻¹, solved anew at each call."""
        damping = self.resolve_damping(problem)
        curvature = make_curvature(problem.model, problem.train, self.curvature)
        notes["damping"] = damping
        solves: list[JSON] = []
        notes["solves"] = solves

        def apply(rows: Tensor) -> Tensor:
            space = curvature.around(rows)
            x, solved = conjugate_gradients(space, damping, self.tolerance, self.max_iterations)
            solves.append(cast(JSON, solved))
            problem.say(f"{self.name}: {solved['converged']} of {len(rows)} right-hand sides converged")
            self._warn(problem, notes, solved)
            return space.rows(x)

        return apply

    def _warn(self, problem: Problem, notes: Notes, solved: Solved) -> None:
        """One line, to the notes too, if the systems or the gradients cannot bear so small a damping."""
        residuals, damping = solved["relative_residual"], notes["damping"]
        assert isinstance(damping, float)
        far = [r for r in residuals if not r <= UNSOLVED * self.tolerance]
        rounding = torch.finfo(problem.model.dtype).eps
        if far:
            line = (
                f"{len(far)} of {len(residuals)} right-hand sides are solved to a relative residual of {max(far):.1e} "
                f"at worst, not to the tolerance of {self.tolerance:.0e}: raise damping or max_iterations, or set "
                "precision: float64"
            )
        elif rounding * solved["largest_curvature"] > MAGNIFIED * damping:
            line = (
                f"the largest curvature is {solved['largest_curvature'] / max(damping, 1e-300):.0e} times the damping, "
                f"which magnifies the gradients' rounding ({rounding:.0e}) to their own size although the relative "
                f"residual is {max(residuals):.1e}: raise damping, or set precision: float64"
            )
        else:
            return
        notes.setdefault("warning", line)
        problem.say(f"warning: {self.name}: {line}")


class Solved(TypedDict):
    """Of the systems of one block: iterations and true relative residual of each, two counts, and a lower bound of the
    damped curvature's largest eigenvalue (the largest Rayleigh quotient of a search direction)."""

    iterations: list[int]
    relative_residual: list[float]
    converged: int
    negative_curvature: int
    largest_curvature: float


def conjugate_gradients(space: Space, damping: float, tolerance: float, max_iterations: int) -> tuple[Tensor, Solved]:
    """x with (C + λI)x = ``space.start``, row by row, each stopping by itself.

    Every row has its own step lengths, so that a block's rows are what they would be alone.

    Returns:
        x (k, d), and what is known of the solves: the true residuals are computed from x at the end, and
        ``negative_curvature`` counts the rows that met such a direction.

    Raises:
        DivergedError: C is not finite.
    """
    b = space.start
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    norms = b.norm(dim=1)
    square = residual.square().sum(dim=1)
    iterations = torch.zeros(len(b), dtype=torch.long, device=b.device)
    negative = torch.zeros(len(b), dtype=torch.bool, device=b.device)
    active, largest = square.sqrt() > tolerance * norms, 0.0
    for _ in range(max_iterations):
        if not bool(active.any()):
            break
        rows = active.nonzero().squeeze(1)
        p = direction[rows]
        image = space.apply(p) + damping * p
        slope = (p * image).sum(dim=1)
        if not bool(torch.isfinite(slope).all()):
            raise DivergedError("cg: the curvature is not finite at the final model")
        negative[rows] |= slope < 0
        largest = max(largest, float((slope / p.square().sum(dim=1)).max()))
        step = torch.where(slope != 0, square[rows] / slope, 0)[:, None]
        x[rows] += step * p
        residual[rows] -= step * image
        fresh = residual[rows].square().sum(dim=1)
        direction[rows] = residual[rows] + (fresh / square[rows])[:, None] * p
        square[rows] = fresh
        iterations[rows] += 1
        active = square.sqrt() > tolerance * norms
    true = (b - space.apply(x) - damping * x).norm(dim=1) / norms.clamp_min(torch.finfo(b.dtype).tiny)
    return x, {
        "iterations": iterations.tolist(),
        "relative_residual": true.tolist(),
        "converged": int((~active).sum()),
        "negative_curvature": int(negative.sum()),
        "largest_curvature": largest,
    }
