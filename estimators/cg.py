"""Influence by conjugate gradients: P = (C + λI)⁻¹, C the Gauss-Newton matrix or the Hessian of the mean loss.

Source: Martens, Deep learning via Hessian-free optimization (2010), for CG on curvature products; Koh and
Liang (2017), section 3, for influence. Several λ share one Krylov space: see ``operators.krylov``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fimo.estimators.counts import ITERATIONS, Work, of_curvature
from fimo.estimators.declared import shipped as declared
from fimo.estimators.declared.base import JSON
from fimo.estimators.differentiable import flat_loss
from fimo.estimators.ekfac import as_inverse
from fimo.estimators.influence import Influence, Preconditioner
from fimo.estimators.matching import Shift
from fimo.estimators.operators.kronecker import coverage
from fimo.estimators.operators.krylov import Solved, conjugate_gradients, preconditioned
from fimo.estimators.operators.spaces import Curvature, Space, make_curvature, outputs_of
from fimo.estimators.problem import Notes, Problem

UNSOLVED = 1000
"""How many times the tolerance a true residual may be before the reader is warned."""

MAGNIFIED = 1.0
"""Part of a gradient that its rounding may become, magnified by the condition number, before the reader is warned."""


@dataclass(frozen=True)
class CG(declared.CG, Influence):
    """(C + λD)⁻¹ ∇g by conjugate gradients, all evaluation examples of a block together.

    Iterates, inner products and residuals are float64 whatever the model's dtype, because a small damping magnifies
    their rounding. A true residual far above the tolerance is in the notes as a warning.

    Cost: an iteration is a product with C for every right-hand side, however many recorded steps there are; see
    ``spaces`` for when that is cheap. Preconditioned, every recorded step has iterations of its own.
    """

    def unsuited(self, problem: Problem) -> str | None:
        """The Gauss-Newton matrix is 0, or EK-FAC covers nothing."""
        if self.preconditioner == "ekfac" and coverage(problem.model) == 0:
            return "EK-FAC covers no trainable parameter of the model; leave the preconditioner out"
        return super().unsuited(problem) or (flat_loss(problem) if self.curvature == "gauss_newton" else None)

    def work(self, problem: Problem) -> Work:
        """As many iterations as ``ITERATIONS`` or ``max_iterations`` for every evaluation gradient."""
        outputs = outputs_of(problem.model, problem.train) if self.curvature == "gauss_newton" else 0
        times = 1 if self.preconditioner is None else len(self.amounts(problem) or (0,))
        iterations = times * min(self.max_iterations, ITERATIONS)
        return super().work(problem) + of_curvature(problem, outputs, iterations) + Work(calls=float(iterations))

    def rows_kept(self, systems: int) -> int:
        """A solution and a direction for every λ, in float64."""
        return systems if systems == 1 else 4 * systems

    def preconditioning(self, problem: Problem, notes: Notes) -> Preconditioner:
        """(C + λD)⁻¹, solved anew at each call."""
        shift = self.shift(problem)
        curvature = make_curvature(problem.model, problem.train, self.curvature, shift.scale)
        inverse = as_inverse(problem, shift, notes) if self.preconditioner == "ekfac" else None
        shift.note(notes)
        solves: list[JSON] = []
        notes["solves"] = solves

        def apply(rows: Tensor) -> Tensor:
            if inverse is None:
                space = curvature.around(rows)
                x, solved = conjugate_gradients(space, shift.values, self.tolerance, self.max_iterations)
                solves.append(cast(JSON, solved))
                self._warn(problem, notes, solved, min(shift.values))
            else:
                space, x = self._one_by_one(problem, notes, curvature, rows, shift, inverse, solves)
            problem.say(f"{self.name}: {len(rows)} right-hand sides, {len(shift.values)} dampings")
            solutions = space.rows(x)
            return solutions if shift.steps is not None else solutions[0]

        return apply

    def _one_by_one(
        self,
        problem: Problem,
        notes: Notes,
        curvature: Curvature,
        rows: Tensor,
        shift: Shift,
        inverse: Callable[[Tensor, float], Tensor],
        solves: list[JSON],
    ) -> tuple[Space, Tensor]:
        """The preconditioned systems from the largest λ to the smallest, each begun at the solution before."""
        space, x = curvature.whole(rows), None
        found: dict[int, Tensor] = {}
        for place in sorted(range(len(shift.values)), key=lambda at: -shift.values[at]):
            damping = shift.values[place]
            x, solved = preconditioned(space, damping, _at(inverse, damping), self.tolerance, self.max_iterations, x)
            solves.append({"damping": damping, **cast("dict[str, JSON]", solved)})
            self._warn(problem, notes, solved, damping)
            found[place] = x
        return space, torch.stack([found[place] for place in range(len(shift.values))])

    def _warn(self, problem: Problem, notes: Notes, solved: Solved, damping: float) -> None:
        """One line, to the notes too, if the systems or the gradients cannot bear so small a damping."""
        residuals = solved["relative_residual"]
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


def _at(inverse: Callable[[Tensor, float], Tensor], damping: float) -> Callable[[Tensor], Tensor]:
    return lambda rows: inverse(rows, damping)
