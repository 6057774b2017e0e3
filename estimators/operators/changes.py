"""What removals change of a trajectory, carried along for all of them at once: (δ, μ) of θ and the optimizer's rows.

The baseline is (θ, m)_{s+1} = U_s(θ_s, m_s, ∇L_s(θ_s)), a removal's cell the same with the loss L_s + q_s. The loss's
gradient alone is made linear, about the baseline: γ_s = ∇²L_s(θ_s) δ_s + ∇q_s(θ_s). There are two ways on from there:

    derivative       (δ, μ)_{s+1} = ∂U_s · (δ_s, μ_s, γ_s)
    finite change    (δ, μ)_{s+1} = U_s(θ_s + δ_s, m_s + μ_s, ∇L_s + γ_s) − U_s(θ_s, m_s, ∇L_s)

They are one under SGD, where U is linear. Under Adam and AdamW the derivative is no guide: near a gradient of zero a
step is all but a sign. Nor is it if gradients are clipped and their norm crosses the bound, or a batch changes by more
than a little: measured against the runs of a small classifier, the derivative was wrong by up to 107% of the effect,
the finite change by at most 2%; where the bound was not reached both were as good. The finite change goes through U as
it is, and is exact where the loss's gradient is linear.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap

from fimo.estimators.operators import gradients, optimizers
from fimo.estimators.operators.gradients import directional
from fimo.estimators.operators.growth import Growth
from fimo.estimators.operators.optimizers import State
from fimo.estimators.operators.trajectory import Point, Step, Trajectory
from fimo.workers.settings import FurtherTraining


def is_finite(settings: FurtherTraining) -> bool:
    """Whether finite changes are carried, not derivatives: under Adam and AdamW, and if gradients are clipped."""
    return settings.optimizer.name != "sgd" or settings.clip_norm is not None


def carried(trajectory: Trajectory) -> Changes:
    """The changes of the trajectory's removals before its first step: none."""
    return FiniteChanges(trajectory) if is_finite(trajectory.settings) else Derivatives(trajectory)


def scalars(size: int, settings: FurtherTraining) -> int:
    """Scalars that one removal holds, in units of the model's, for P = ``size``.

    θ's row and the optimizer's count twice: as derivatives while a step makes new ones, as finite changes for they are
    float64, and these go in pairs. The rest is the change of the gradient and what it is made of.
    """
    rows = 1 + len(optimizers.fresh_state(settings.optimizer, torch.zeros(0)))
    return size * ((4 if is_finite(settings) else 2) * rows + 4)


class Changes(ABC):
    """The changes of R removals after ``point.number`` steps.

    Attributes:
        point: the baseline.
        growth: whether they are still to be trusted.
    """

    def __init__(self, trajectory: Trajectory, growth: Growth) -> None:
        self.trajectory, self.point, self.growth = trajectory, trajectory.start(), growth

    @property
    @abstractmethod
    def moved(self) -> Tensor:
        """δ, rows (R, P) in the model's dtype."""

    @property
    def seen(self) -> Point:
        """The baseline in the model's dtype."""
        return self.point

    def advance(self, step: Step) -> None:
        """Carry the changes and the baseline through the step."""
        trajectory, seen = self.trajectory, self.seen
        direct = trajectory.change_gradients(seen, step)
        bent = direct if step.number == 1 else direct + trajectory.curve(seen, step, self.moved)
        norms, responses = self._carry(step.number, trajectory.gradient(seen, step), direct, bent)
        self.growth.take(step.number, norms, responses)

    @abstractmethod
    def _carry(self, number: int, gradient: Tensor, direct: Tensor, bent: Tensor) -> tuple[Tensor, Tensor]:
        """One step with ∇L_s (P,), ∇q_s and γ_s (R, P): ‖δ‖ after it, and what it adds to the reach, (R,) each."""


class Derivatives(Changes):
    """First order in the removal, through the optimizer too."""

    def __init__(self, trajectory: Trajectory) -> None:
        momentum = trajectory.settings.optimizer.momentum
        super().__init__(trajectory, Growth(len(trajectory.removals), momentum, together=False))
        self._moved = self.point.params.new_zeros(len(trajectory.removals), trajectory.layout.size)
        self._state: State = {name: torch.zeros_like(self._moved) for name in self.point.state}

    @property
    def moved(self) -> Tensor:
        """δ, (R, P)."""
        return self._moved

    def _carry(self, number: int, gradient: Tensor, direct: Tensor, bent: Tensor) -> tuple[Tensor, Tensor]:
        update = self.trajectory.update(number)
        primal = (self.point.params, self.point.state, gradient)
        tangent = vmap(_tangent_of(update, primal))
        response = tangent(torch.zeros_like(direct), {n: torch.zeros_like(s) for n, s in self._state.items()}, direct)
        self._moved, self._state = tangent(self._moved, self._state, bent)
        self.point = Point(number, *update(*primal))
        return self._moved.norm(dim=1), response[0].norm(dim=1)


Update = Callable[[Tensor, State, Tensor], tuple[Tensor, State]]


def _tangent_of(
    update: Update, primal: tuple[Tensor, State, Tensor]
) -> Callable[[Tensor, State, Tensor], tuple[Tensor, State]]:
    """(δ, μ, γ) ↦ ∂U · (δ, μ, γ) at the primal (θ, m, ∇L)."""

    def tangent(d: Tensor, s: State, g: Tensor) -> tuple[Tensor, State]:
        return directional(lambda at: update(*at), primal, (d, s, g))[1]

    return tangent


class FiniteChanges(Changes):
    """The removals' own θ + δ and m + μ, in float64: a difference of float32 parameters would be rounding.

    The optimizer's arithmetic is float64 on both sides; the loss's derivatives are in the model's dtype. Beside each
    goes its *straight* change, whose loss has no curvature (γ = ∇q): its path's length is the reach for ``Growth``.
    A step's own response would not do: Adam's first step is a sign, and what changes its moments shows later.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        super().__init__(trajectory, Growth(len(trajectory.removals), momentum=0.0, together=True))
        self.point = Point(0, self.point.params.double(), {n: s.double() for n, s in self.point.state.items()})
        self._runs, self._straight = (self._copies(len(trajectory.removals)) for _ in range(2))

    def _copies(self, count: int) -> tuple[Tensor, State]:
        params = self.point.params.repeat(count, 1)
        return params, {name: row.repeat(count, 1) for name, row in self.point.state.items()}

    @property
    def moved(self) -> Tensor:
        """δ, (R, P): the difference is taken in float64."""
        return (self._runs[0] - self.point.params).to(self.trajectory.model.dtype)

    @property
    def seen(self) -> Point:
        """The baseline rounded to the model's dtype, without the optimizer's rows."""
        return Point(self.point.number, self.point.params.to(self.trajectory.model.dtype), {})

    def _carry(self, number: int, gradient: Tensor, direct: Tensor, bent: Tensor) -> tuple[Tensor, Tensor]:
        update, gradient = self.trajectory.update(number), gradient.double()
        params, state = update(self.point.params, self.point.state, gradient)
        norms, paths = [], []
        # In place and a few removals at a time: the arithmetic's own rows must not be as many as theirs.
        for rows in _slices(len(direct), max(1, gradients.stream(direct.device) // self.trajectory.layout.size)):
            _step(update, self._runs, rows, gradient + bent[rows])
            norms.append((self._runs[0][rows] - params).norm(p=1, dim=1))
            before = self._straight[0][rows] - self.point.params
            _step(update, self._straight, rows, gradient + direct[rows])
            paths.append((self._straight[0][rows] - params - before).norm(p=1, dim=1))
        self.point = Point(number, params, state)
        return torch.cat(norms), torch.cat(paths)


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _step(update: Update, runs: tuple[Tensor, State], rows: slice, gradient: Tensor) -> None:
    """One step of some of the runs, in place."""
    params, state = runs
    params[rows], after = update(params[rows], {name: s[rows] for name, s in state.items()}, gradient)
    for name, row in after.items():
        state[name][rows] = row
