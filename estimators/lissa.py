"""Influence by the Neumann series on random batches: LiSSA (Gauss-Newton) and LiSSA-H (Hessian).

    u_0 = 0,    u_{t+1} = u_t + M⁻¹ (v − (C_t + λI) u_t) / s,    P v ≈ u_depth,

C_t the curvature of a fresh random batch, so that E[u_t] = Σ_{k<t} (I − M⁻¹(C + λI)/s)ᵏ M⁻¹v / s exactly, which
tends to (C + λI)⁻¹ v. Averaged over ``repeats`` independent runs. M is I, or EK-FAC's (``operators.nystrom``), with
which the recursion is done in a fraction of the steps. Sources: Agarwal et al., Second-order stochastic
optimization for machine learning in linear time (JMLR 2017); Koh and Liang (2017), section 3; for the preconditioner
Wang et al., Better training data attribution via better inverse Hessian-vector products (2025, arXiv 2507.14740).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fimo.estimators.counts import Work, of_curvature
from fimo.estimators.declared import shipped as declared
from fimo.estimators.declared.base import JSON
from fimo.estimators.differentiable import flat_loss
from fimo.estimators.ekfac import as_inverse
from fimo.estimators.influence import Influence, Preconditioner
from fimo.estimators.operators.gradients import Layout
from fimo.estimators.operators.kronecker import coverage
from fimo.estimators.operators.spaces import Curvature, Space, make_curvature, outputs_of
from fimo.estimators.problem import Notes, Problem
from fimo.workers.errors import DivergedError

TRACE = 20
"""Points of the convergence trace."""

POWER_ITERATIONS = 30

GROWTH = 10.0
"""How far past its bound an iterate may be before the recursion counts as diverging."""

FORGOTTEN = 8
"""Time constants s/λ after which a matched recursion ends: e⁻⁸ of a direction without curvature is still to come."""


@dataclass(frozen=True)
class LiSSA(declared.LiSSA, Influence):
    """LiSSA with the Gauss-Newton matrix.

    If the damping is matched, at most 8 of the recorded steps are solved for, spread evenly in log t, all in one
    recursion; each of them ends after ``FORGOTTEN`` of its own time constants, or at ``depth``.

    Cost: depth·repeats products with the curvature of a batch, for every right-hand side and λ.
    """

    curvature: ClassVar[Literal["gauss_newton", "hessian"]] = "gauss_newton"
    solved: ClassVar[int | None] = 8

    def unsuited(self, problem: Problem) -> str | None:
        """The Gauss-Newton matrix is 0, or EK-FAC covers nothing."""
        if self.preconditioner == "ekfac" and coverage(problem.model) == 0:
            return "EK-FAC covers no trainable parameter of the model; leave the preconditioner out"
        return super().unsuited(problem) or (flat_loss(problem) if self.curvature == "gauss_newton" else None)

    def work(self, problem: Problem) -> Work:
        """Every λ to its depth, as far as that can be told before its scale is known."""
        assert self.depth is not None
        steps, n = self.amounts(problem), len(problem.train)
        outputs = outputs_of(problem.model, problem.train) if self.curvature == "gauss_newton" else 0
        # s/λ_t lies between 1 (no curvature) and 1 + 2t (as much as stable training has).
        likely = [math.ceil(FORGOTTEN * (1 + step / 2)) for step in steps or ()]
        depths = [self.depth] if steps is None else [min(self.depth, depth) for depth in likely]
        examples = sum(depths) * self.repeats * min(self.batch_size, n) + 9 * POWER_ITERATIONS * self.batch_size
        calls = max(depths) * self.repeats + 9.0 * POWER_ITERATIONS
        return super().work(problem) + of_curvature(problem, outputs, examples / n) + Work(calls=calls)

    def rows_kept(self, systems: int) -> int:
        """An iterate, a residual and their sum over repeats for every λ, in float64."""
        return systems if systems == 1 else 6 * systems

    def preconditioning(self, problem: Problem, notes: Notes) -> Preconditioner:
        """The truncated series, run anew at each call."""
        shift, size = self.shift(problem), len(problem.train)
        curvature = make_curvature(problem.model, problem.train, self.curvature, shift.scale)
        inverse = as_inverse(problem, shift, notes) if self.preconditioner else None
        scales = self._scales(problem, curvature, shift.values, inverse)
        depths = self._depths(shift.values, scales, matched=shift.steps is not None)
        shift.note(notes)
        notes.update(scale=list(scales) if shift.steps is not None else scales[0], depths=list(depths))
        traces: list[JSON] = []
        notes["trace"] = traces

        def apply(rows: Tensor) -> Tensor:
            space = curvature.around(rows) if inverse is None else curvature.whole(rows)
            total = space.start.new_zeros(len(depths), *space.start.shape)
            for repeat in range(self.repeats):
                batches = _batches(size, self.batch_size, max(depths), self.seed + repeat)
                x, trace = neumann(space, shift.values, scales, batches, depths, self.name, inverse)
                total += x
                traces.append(trace)
                problem.say(f"{self.name}: run {repeat + 1} of {self.repeats} done")
            solutions = space.rows(total / self.repeats)
            return solutions if shift.steps is not None else solutions[0]

        return apply

    def _scales(
        self, problem: Problem, curvature: Curvature, dampings: Sequence[float], inverse: Inverse | None
    ) -> tuple[float, ...]:
        """s of each λ."""
        if self.scale is not None:
            return (self.scale,) * len(dampings)
        batches: list[Sequence[int] | None] = [None, *_batches(len(problem.train), self.batch_size, 8, self.seed)]
        if inverse is not None:
            # The smallest λ has the largest eigenvalue, for all of them tend to 1 as λ grows.
            least = min(dampings)
            largest = largest_eigenvalue(problem, curvature, batches, lambda x: inverse(x, least), least)
            return (largest,) * len(dampings)
        largest = largest_eigenvalue(problem, curvature, batches)
        return tuple(largest + damping for damping in dampings)

    def _depths(self, dampings: Sequence[float], scales: Sequence[float], matched: bool) -> tuple[int, ...]:
        assert self.depth is not None
        if not matched or self.preconditioner:
            return (self.depth,) * len(dampings)
        most = self.depth
        return tuple(min(most, math.ceil(FORGOTTEN * s / v)) for s, v in zip(scales, dampings, strict=True))


@dataclass(frozen=True)
class LiSSAH(declared.LiSSAH, LiSSA):
    """LiSSA with the Hessian. Directions of negative curvature beyond λ make it grow, which is an error."""

    curvature: ClassVar[Literal["gauss_newton", "hessian"]] = "hessian"


Inverse = Callable[[Tensor, float], Tensor]
"""(rows (k, P), λ) -> M⁻¹ of them."""


def neumann(
    space: Space,
    dampings: Sequence[float],
    scales: Sequence[float],
    batches: Iterator[Sequence[int] | None],
    depths: Sequence[int],
    name: str,
    inverse: Inverse | None = None,
) -> tuple[Tensor, list[JSON]]:
    """u at its depth (λ, k, d) for ``space.start``, and the trace [step, median and largest ‖v − (C_t + λI)u_t‖ / ‖v‖].

    While 0 ≤ C_t + λI ≤ s, ‖u_t‖ ≤ t‖v‖/s; that is how growth is told from convergence. (Preconditioned: t‖M⁻¹v‖/s.)

    Raises:
        DivergedError: an iterate is not finite, or ``GROWTH`` times longer than that bound.
    """
    b = space.start
    norms = b.norm(dim=1).clamp_min(torch.finfo(b.dtype).tiny)
    first = torch.stack([b if inverse is None else inverse(b, value) for value in dampings])
    bounds = first.norm(dim=2).clamp_min(torch.finfo(b.dtype).tiny)
    u, (count, size) = b.new_zeros(len(dampings), *b.shape), b.shape
    values, s = (torch.tensor(x, dtype=b.dtype, device=b.device)[:, None, None] for x in (dampings, scales))
    trace: list[JSON] = []
    checks = set(torch.linspace(1, max(depths), min(TRACE, max(depths))).round().int().tolist())
    for step, batch in enumerate(batches, start=1):
        open_ = [place for place, depth in enumerate(depths) if step <= depth]
        here = u[open_]
        image = space.apply(here.reshape(len(open_) * count, size), batch).reshape(here.shape)
        residual = b - image - values[open_] * here
        change = residual
        if inverse is not None:
            change = torch.stack([inverse(r, dampings[place]) for place, r in zip(open_, residual, strict=True)])
        here = here + change / s[open_]
        u[open_] = here
        if step in checks or step == max(depths):
            length = float((here.norm(dim=2) / bounds[open_] * s[open_, :, 0]).max()) / step if count else 0.0
            if not length <= GROWTH:
                raise DivergedError(
                    f"{name}: the recursion grows instead of converging (step {step} of {max(depths)}, scale "
                    f"{max(scales):.3g}): raise damping or scale, or lower depth"
                )
            relative = residual.norm(dim=2) / norms
            if count:
                trace.append([step, float(relative.median()), float(relative.max())])
    return u, trace


def _batches(size: int, batch_size: int, count: int, seed: int) -> Iterator[list[int] | None]:
    """``count`` independent random subsets of ``range(size)``; None if a batch is everything."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        whole = batch_size >= size
        yield None if whole else torch.randperm(size, generator=generator)[:batch_size].tolist()


def largest_eigenvalue(
    problem: Problem,
    curvature: Curvature,
    batches: Sequence[Sequence[int] | None],
    inverse: Callable[[Tensor], Tensor] = lambda x: x,
    damping: float = 0.0,
) -> float:
    """Largest |eigenvalue| of M⁻¹(C + λI) over any of ``batches``, by power iteration from a seeded vector.

    Raises:
        DivergedError: the curvature is zero or not finite.
    """
    model = problem.model
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, Layout.of(model.params).size, generator=generator, dtype=torch.float64)
    rows = start.to(model.device, model.dtype)
    space = curvature.around(rows) if damping == 0 else curvature.whole(rows)
    largest = 0.0
    for batch in batches:
        x, value = space.start, 0.0
        for _ in range(POWER_ITERATIONS):
            x = x / x.norm()
            x = inverse(space.apply(x, batch) + damping * x)
            value = float(x.norm())
            if not 0 < value < math.inf:
                break
        largest = max(largest, value) if math.isfinite(value) else value
        if not math.isfinite(value):
            break
    if not 0 < largest < math.inf:
        raise DivergedError("lissa: the curvature's largest eigenvalue is zero or not finite at the final model")
    return largest
