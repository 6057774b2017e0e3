"""Conjugate gradients for (C + λI) x = v: for many λ in one Krylov space, or preconditioned for one.

The Krylov space of v is the same for every shift of C, and the residuals of the shifted systems are multiples of one
another, r_λ = r / π_λ, so that one product with C an iteration serves all of them. Source: Frommer and Maass, Fast
CG-based methods for Tikhonov-Phillips regularization (1999); Jegerlehner, Krylov space solvers for shifted linear
systems (1996). A preconditioner is of one λ and shares nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from fimo.estimators.operators.spaces import Space
from fimo.workers.errors import DivergedError


class Solved(TypedDict):
    """Of the systems of one block: iterations and largest true relative residual of each right-hand side, two counts
    of right-hand sides, and a lower bound of C + λI's largest eigenvalue (the largest Rayleigh quotient of a search
    direction; 0 if not looked at)."""

    iterations: list[int]
    relative_residual: list[float]
    converged: int
    negative_curvature: int
    largest_curvature: float


NOT_FINITE = "cg: the curvature is not finite at the final model"


def conjugate_gradients(
    space: Space, shifts: Sequence[float], tolerance: float, max_iterations: int
) -> tuple[Tensor, Solved]:
    """x with (C + λI)x = ``space.start`` for every λ, row by row, each stopping by itself.

    The smallest λ is iterated on, the others follow. Every row has its own step lengths, so that a block's rows are
    what they would be alone.

    Returns:
        x (shifts, k, d), and what is known of the solves. The residuals are computed from x at the end: of the
        smallest λ, and of all by one product with a signed sum of them. ``negative_curvature`` counts the rows that
        met such a direction.

    Raises:
        DivergedError: C is not finite.
    """
    b, smallest = space.start, min(shifts)
    residual, direction = b.clone(), b.clone()
    norms = b.norm(dim=1)
    square = residual.square().sum(dim=1)
    iterations = torch.zeros(len(b), dtype=torch.long, device=b.device)
    negative = torch.zeros(len(b), dtype=torch.bool, device=b.device)
    systems = [_Shifted(b, shift - smallest, tolerance * norms) for shift in shifts]
    active, largest = square.sqrt() > tolerance * norms, 0.0
    for _ in range(max_iterations):
        if not bool(active.any()):
            break
        rows = active.nonzero().squeeze(1)
        p = direction[rows]
        image = space.apply(p) + smallest * p
        slope = (p * image).sum(dim=1)
        if not bool(torch.isfinite(slope).all()):
            raise DivergedError(NOT_FINITE)
        negative[rows] |= slope < 0
        largest = max(largest, float((slope / p.square().sum(dim=1)).max()))
        step = torch.where(slope != 0, square[rows] / slope, 0)
        residual[rows] -= step[:, None] * image
        fresh = residual[rows].square().sum(dim=1)
        turn = fresh / square[rows]
        for system in systems:
            system.follow(rows, p, residual[rows], step, turn, fresh.sqrt())
        direction[rows] = residual[rows] + turn[:, None] * p
        square[rows] = fresh
        iterations[rows] += 1
        active = square.sqrt() > tolerance * norms
    x = torch.stack([system.x for system in systems])
    return x, {
        "iterations": iterations.tolist(),
        "relative_residual": _true_residuals(space, shifts, x).tolist(),
        "converged": int((~active).sum()),
        "negative_curvature": int(negative.sum()),
        "largest_curvature": largest,
    }


class _Shifted:
    """The system of λ + δ, λ being iterated on: its solution, and π with r_{λ+δ} = r_λ / π, row by row.

    π_{j+1} = (1 + α_j δ) π_j + α_j β_{j−1} / α_{j−1} · (π_j − π_{j−1}), π_0 = π_{−1} = 1; α and β are λ's.
    """

    def __init__(self, b: Tensor, shift: float, enough: Tensor) -> None:
        self.x = torch.zeros_like(b)
        self._shift, self._enough = shift, enough
        if shift:
            self._direction = b.clone()
            one = torch.ones(len(b), dtype=b.dtype, device=b.device)
            self._now, self._before, self._ratio = one, one.clone(), torch.zeros_like(one)
            self._open = torch.ones(len(b), dtype=torch.bool, device=b.device)

    def follow(self, rows: Tensor, p: Tensor, residual: Tensor, step: Tensor, turn: Tensor, length: Tensor) -> None:
        """One iteration: λ's direction, its residual afterwards and that one's norm, α and β, of the active rows."""
        if not self._shift:
            self.x[rows] += step[:, None] * p
            return
        here = self._open[rows]
        if not bool(here.any()):
            return
        if not bool(here.all()):
            rows, residual, step, turn, length = rows[here], residual[here], step[here], turn[here], length[here]
        now, before = self._now[rows], self._before[rows]
        then = (1 + step * self._shift) * now + step * self._ratio[rows] * (now - before)
        own = self._direction[rows]
        self.x[rows] += (step * now / then)[:, None] * own
        self._direction[rows] = residual / then[:, None] + (turn * (now / then).square())[:, None] * own
        self._now[rows], self._before[rows] = then, now
        self._ratio[rows] = torch.where(step != 0, turn / step, 0)
        self._open[rows] = length / then.abs() > self._enough[rows]


def _true_residuals(space: Space, shifts: Sequence[float], x: Tensor) -> Tensor:
    """The larger of two relative residuals of each row (k,): the smallest λ's, and that of a signed sum of all."""
    b = space.start
    norms = b.norm(dim=1).clamp_min(torch.finfo(b.dtype).tiny)
    place = min(range(len(shifts)), key=lambda at: shifts[at])
    worst: Tensor = (b - space.apply(x[place]) - shifts[place] * x[place]).norm(dim=1) / norms
    if len(shifts) == 1:
        return worst
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(2, (len(shifts),), generator=generator) * 2 - 1).to(b)
    total = torch.einsum("s,skd->kd", signs, x)
    damped = torch.einsum("s,skd->kd", signs * torch.tensor(shifts, dtype=b.dtype, device=b.device), x)
    return torch.maximum(worst, (signs.sum() * b - space.apply(total) - damped).norm(dim=1) / norms)


def preconditioned(
    space: Space,
    shift: float,
    inverse: Callable[[Tensor], Tensor],
    tolerance: float,
    max_iterations: int,
    start: Tensor | None = None,
) -> tuple[Tensor, Solved]:
    """x (k, d) with (C + λI)x = ``space.start``, by conjugate gradients in the inner product of M⁻¹.

    Args:
        inverse: M⁻¹ on rows (k, d), symmetric and positive.
        start: where x begins; None = 0.

    Stops as ``conjugate_gradients`` does, at the same residual. Source: Saad, Iterative methods for sparse linear
    systems (2003), algorithm 9.1. Raises DivergedError as it does.
    """
    b = space.start
    x = torch.zeros_like(b) if start is None else start.clone()
    residual = b.clone() if start is None else b - space.apply(x) - shift * x
    norms = b.norm(dim=1)
    z = inverse(residual)
    direction, product = z.clone(), (residual * z).sum(dim=1)
    iterations = torch.zeros(len(b), dtype=torch.long, device=b.device)
    negative = torch.zeros(len(b), dtype=torch.bool, device=b.device)
    active = residual.norm(dim=1) > tolerance * norms
    for _ in range(max_iterations):
        if not bool(active.any()):
            break
        rows = active.nonzero().squeeze(1)
        p = direction[rows]
        image = space.apply(p) + shift * p
        slope = (p * image).sum(dim=1)
        if not bool(torch.isfinite(slope).all()):
            raise DivergedError(NOT_FINITE)
        negative[rows] |= slope < 0
        step = torch.where(slope != 0, product[rows] / slope, 0)[:, None]
        x[rows] += step * p
        residual[rows] -= step * image
        z = inverse(residual[rows])
        fresh = (residual[rows] * z).sum(dim=1)
        direction[rows] = z + torch.where(product[rows] != 0, fresh / product[rows], 0)[:, None] * p
        product[rows] = fresh
        iterations[rows] += 1
        active = residual.norm(dim=1) > tolerance * norms
    return x, {
        "iterations": iterations.tolist(),
        "relative_residual": _true_residuals(space, [shift], x[None]).tolist(),
        "converged": int((~active).sum()),
        "negative_curvature": int(negative.sum()),
        "largest_curvature": 0.0,
    }
