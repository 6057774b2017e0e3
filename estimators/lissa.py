"""Influence by the Neumann series on random batches: LiSSA (Gauss-Newton) and LiSSA-H (Hessian).

    u_0 = 0,    u_{t+1} = u_t + (v − (C_t + λI) u_t) / s,    P v ≈ u_depth,

C_t the curvature of a fresh random batch, so that E[u_t] = Σ_{k<t} (I − (C + λI)/s)ᵏ v / s exactly, which
tends to (C + λI)⁻¹ v. Averaged over ``repeats`` independent runs. Sources: Agarwal et al., Second-order
stochastic optimization for machine learning in linear time (JMLR 2017); Koh and Liang (2017), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fimo.estimators.base import JSON, Notes, Problem, flat_loss
from fimo.estimators.influence import Influence, Preconditioner
from fimo.estimators.operators.gradients import Layout
from fimo.estimators.operators.spaces import Curvature, Space, make_curvature
from fimo.workers.errors import DivergedError

TRACE = 20
"""Points of the convergence trace."""

POWER_ITERATIONS = 30

GROWTH = 10.0
"""How far past its bound an iterate may be before the recursion counts as diverging."""


@dataclass(frozen=True)
class LiSSA(Influence):
    """LiSSA with the Gauss-Newton matrix.

    Attributes:
        depth: steps t of the recursion: directions of curvature above s/depth are inverted.
        repeats: independent runs that are averaged.
        batch_size: examples in a random batch; n or more takes all of 𝒟 at every step, without noise.
        scale: s; None = the largest eigenvalue by power iteration over 𝒟 and the first batches, plus λ.
        seed: of the batches, which are the same for every evaluation example.

    Cost: depth·repeats products with the curvature of a batch, for every right-hand side.
    """

    name: ClassVar[str] = "lissa"
    curvature: ClassVar[Literal["gauss_newton", "hessian"]] = "gauss_newton"

    depth: int = 5000
    repeats: int = 1
    batch_size: int = 64
    scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(min(self.depth, self.repeats, self.batch_size) >= 1, "depth, repeats and batch_size must be ≥ 1")
        self.require(self.scale is None or self.scale > 0, "scale must be positive")

    def unsuited(self, problem: Problem) -> str | None:
        """The Gauss-Newton matrix is 0."""
        return super().unsuited(problem) or (flat_loss(problem) if self.curvature == "gauss_newton" else None)

    def preconditioner(self, problem: Problem, notes: Notes) -> Preconditioner:
        """The truncated series, run anew at each call."""
        damping = self.resolve_damping(problem)
        size = len(problem.train)
        curvature = make_curvature(problem.model, problem.train, self.curvature)
        scale = self.scale
        if scale is None:
            batches = list(_batches(size, self.batch_size, 8, self.seed))
            scale = largest_eigenvalue(problem, curvature, [None, *batches]) + damping
        notes.update(damping=damping, scale=scale)
        traces: list[JSON] = []
        notes["trace"] = traces

        def apply(rows: Tensor) -> Tensor:
            space = curvature.around(rows)
            total = torch.zeros_like(space.start)
            for repeat in range(self.repeats):
                batches = _batches(size, self.batch_size, self.depth, self.seed + repeat)
                x, trace = neumann(space, damping, scale, batches, self.depth, self.name)
                total += x
                traces.append(trace)
                problem.say(f"{self.name}: run {repeat + 1} of {self.repeats} done")
            return space.rows(total / self.repeats)

        return apply


@dataclass(frozen=True)
class LiSSAH(LiSSA):
    """LiSSA with the Hessian. Directions of negative curvature beyond λ make it grow, which is an error.

    The Hessian cannot be compressed as the Gauss-Newton matrix can, hence the lower default depth.
    """

    name: ClassVar[str] = "lissa_h"
    curvature: ClassVar[Literal["gauss_newton", "hessian"]] = "hessian"

    depth: int = 500


def neumann(
    space: Space,
    damping: float,
    scale: float,
    batches: Iterator[Sequence[int] | None],
    depth: int,
    name: str,
) -> tuple[Tensor, list[JSON]]:
    """u_depth (k, d) for ``space.start``, and the trace [step, median and largest ‖v − (C_t + λI)u_t‖ / ‖v‖].

    While 0 ≤ C_t + λI ≤ s, ‖u_t‖ ≤ t‖v‖/s; that is how growth is told from convergence.

    Raises:
        DivergedError: an iterate is not finite, or ``GROWTH`` times longer than that bound.
    """
    b = space.start
    norms = b.norm(dim=1).clamp_min(torch.finfo(b.dtype).tiny)
    u = torch.zeros_like(b)
    trace: list[JSON] = []
    checks = set(torch.linspace(1, depth, min(TRACE, depth)).round().int().tolist())
    for step, batch in enumerate(batches, start=1):
        residual = b - space.apply(u, batch) - damping * u
        u += residual / scale
        if step in checks:
            relative = residual.norm(dim=1) / norms
            length = float((u.norm(dim=1) / norms).max()) * scale / step
            if not length <= GROWTH:
                raise DivergedError(
                    f"{name}: the recursion grows instead of converging (step {step} of {depth}, scale {scale:.3g}): "
                    "raise damping or scale, or lower depth"
                )
            if len(relative):
                trace.append([step, float(relative.median()), float(relative.max())])
    return u, trace


def _batches(size: int, batch_size: int, count: int, seed: int) -> Iterator[list[int] | None]:
    """``count`` independent random subsets of ``range(size)``; None if a batch is everything."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        whole = batch_size >= size
        yield None if whole else torch.randperm(size, generator=generator)[:batch_size].tolist()


def largest_eigenvalue(problem: Problem, curvature: Curvature, batches: Sequence[Sequence[int] | None]) -> float:
    """Largest |eigenvalue| of the curvature over any of ``batches``, by power iteration from a seeded vector.

    Raises:
        DivergedError: the curvature is zero or not finite.
    """
    model = problem.model
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, Layout.of(model.params).size, generator=generator, dtype=torch.float64)
    space = curvature.around(start.to(model.device, model.dtype))
    largest = 0.0
    for batch in batches:
        x, value = space.start, 0.0
        for _ in range(POWER_ITERATIONS):
            x = x / x.norm()
            x = space.apply(x, batch)
            value = float(x.norm())
            if not 0 < value < math.inf:
                break
        largest = max(largest, value) if math.isfinite(value) else value
        if not math.isfinite(value):
            break
    if not 0 < largest < math.inf:
        raise DivergedError("lissa: the curvature's largest eigenvalue is zero or not finite at the final model")
    return largest
