"""Unrolled further training: the exact first-order effect of a removal along the baseline's own trajectory.

The baseline is θ_{s+1}, m_{s+1} = U_s(θ_s, m_s, ∇L_s(θ_s)), with m the optimizer's state. A removal adds q_s to the
loss of step s (see ``trajectory``). To first order in q its effect is δ_t g = ∇g(z, θ_t)ᵀ δ_t, with

    (δ, μ)_{s+1} = ∂U_s · (δ_s, μ_s, ∇²L_s(θ_s) δ_s + ∇q_s(θ_s)),    (δ, μ)_0 = 0.

**forward** carries one tangent (δ, μ) for each removal. One pass yields every evaluation example at every step.
**adjoint** carries one cotangent for each evaluation example back from a recorded step. One pass yields every removal,
all n training examples if asked for; each recorded step needs its own. It recomputes the baseline from √T checkpoints.
Both are the same sum.

First order is not the whole effect, for two reasons. Adam's step near a gradient of zero is almost a sign, and a sign's
derivative is no guide. A ReLU network's gradient jumps when a unit switches, and no derivative shows that a removal
moves the switch. Averaging over seeds reduces the difference; at large amounts a part of it stays. Sources: Hara et
al., Data cleansing for models trained with SGD (2019); Wei et al., arXiv 2412.03906, section 4, for linearised further
training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.func import vjp, vmap

from fimo.estimators.amounts import NEEDS_TRAINING, recorded_steps, settings_of
from fimo.estimators.base import JSON, Estimate, Hyperparameters, Problem, estimating, finite
from fimo.estimators.operators import gradients
from fimo.estimators.operators.gradients import Layout, directional, each_example, measure_gradients
from fimo.estimators.operators.optimizers import State
from fimo.estimators.operators.trajectory import Point, Step, Trajectory
from fimo.workers.examples import Batch


@dataclass(frozen=True)
class Unrolled(Hyperparameters):
    """Linearised further training, averaged over seeds: an estimate for each recorded step, in units of g.

    Attributes:
        direction: forward, adjoint, or auto: whichever needs fewer products with the Hessian of a batch.
        seeds: how many of the sweep's seeds, the first ones; None = all.
        last_step: estimate no amounts beyond this step; None = all.

    Cost a seed, in Hessian-vector products of a batch: T·R forward; Σ_t t·E over the recorded steps t, and as many
    derivatives of the removals' losses, adjoint.
    """

    name: ClassVar[str] = "unrolled"

    direction: Literal["auto", "forward", "adjoint"] = "auto"
    seeds: int | None = None
    last_step: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.seeds is None or self.seeds >= 1, "seeds must be at least 1")
        self.require(self.last_step is None or self.last_step >= 1, "last_step must be at least 1")

    def follows_training(self) -> bool:
        """Every step is the sweep's own."""
        return True

    def follows_seeds(self, seeds: Sequence[int]) -> tuple[int, ...]:
        """The first ``seeds`` of them."""
        return tuple(seeds)[: self.seeds]

    def unsuited(self, problem: Problem) -> str | None:
        """There is no further training, or no seed, to follow."""
        if problem.further_training is None:
            return NEEDS_TRAINING
        return None if problem.seeds else "follows the sweep's seeds and needs at least one"

    def estimate(self, problem: Problem) -> Estimate:
        """(steps, R, E).

        Raises:
            UsageError: no further-training section or seeds, or see ``trajectory.refuse``.
        """
        self.refuse_unsuited(problem)
        settings, seeds = settings_of(self, problem), list(self.follows_seeds(problem.seeds))
        recorded = recorded_steps(problem, settings)
        steps = tuple(s for s in recorded if self.last_step is None or s <= self.last_step)
        self.require(bool(steps), f"last_step lies before the first recorded step, {recorded[0]}")
        forward = self.direction == "forward" or (self.direction == "auto" and self._forward_is_cheaper(problem, steps))
        along = _forward if forward else _adjoint
        total = torch.zeros(len(steps), len(problem.removals), len(problem.evals), dtype=torch.float64)
        devices = [problem.model.device] if problem.model.device.type == "cuda" else []
        # Dropout is seeded step by step; the caller's random state must not notice.
        with estimating(problem.model), torch.random.fork_rng(devices=devices):
            for number, seed in enumerate(seeds, start=1):
                total += along(problem, steps, seed)
                problem.say(f"unrolled: seed {number} of {len(seeds)} done")
        notes: dict[str, JSON] = {"seeds": seeds, "direction": "forward" if forward else "adjoint"}
        return Estimate(finite(total / len(seeds), self.name), steps, notes)

    def _forward_is_cheaper(self, problem: Problem, steps: Sequence[int]) -> bool:
        return steps[-1] * len(problem.removals) <= 2 * sum(steps) * len(problem.evals)


def _forward(problem: Problem, steps: Sequence[int], seed: int) -> Tensor:
    """(steps, R, E) of one seed by tangents, as many removals at a time as fit ``gradients.HELD``."""
    values, scalars = [], 4 * Layout.of(problem.model.params).size
    together = max(1, gradients.HELD // scalars)
    for start in range(0, len(problem.removals), together):
        removals = [tuple(r) for r in problem.removals[start : start + together]]
        values.append(_tangents(problem, steps, seed, removals))
    shape = (len(steps), 0, len(problem.evals))
    return torch.cat(values, dim=1) if values else torch.zeros(shape, dtype=torch.float64)


def _tangents(problem: Problem, steps: Sequence[int], seed: int, removals: list[tuple[int, ...]]) -> Tensor:
    assert problem.further_training is not None
    trajectory = Trajectory(problem.model, problem.train, problem.further_training, removals, seed)
    point = trajectory.start()
    moved = torch.zeros(len(removals), len(point.params), dtype=point.params.dtype, device=point.params.device)
    state: State = {name: torch.zeros_like(moved) for name in point.state}
    values = []
    for step in trajectory.steps():
        bent = trajectory.curve(point, step, moved) if step.number > 1 else 0.0
        bent = bent + trajectory.change_gradients(point, step)
        gradient, update = trajectory.gradient(point, step), trajectory.update(step.number)
        primal = (point.params, point.state, gradient)

        moved, state = vmap(_tangent_of(update, primal))(moved, state, bent)
        params, own = update(*primal)
        point = Point(step.number, params, own)
        if step.number in steps:
            values.append(_measured(problem, trajectory, point, moved))
        if step.number == steps[-1]:
            break
    return torch.stack(values)


Update = Callable[[Tensor, State, Tensor], tuple[Tensor, State]]


def _tangent_of(
    update: Update, primal: tuple[Tensor, State, Tensor]
) -> Callable[[Tensor, State, Tensor], tuple[Tensor, State]]:
    """(δ, μ, γ) ↦ ∂U · (δ, μ, γ) at the primal (θ, m, ∇L)."""

    def tangent(d: Tensor, s: State, g: Tensor) -> tuple[Tensor, State]:
        return directional(lambda at: update(*at), primal, (d, s, g))[1]

    return tangent


def _measured(problem: Problem, trajectory: Trajectory, point: Point, moved: Tensor) -> Tensor:
    """∇g(z, θ_t)ᵀ δ for every evaluation example and tangent, float64 (R, E) on the CPU."""
    model, layout = problem.model, trajectory.layout
    columns = []
    for _, batch in problem.evals.batches(gradients.BLOCK):

        def along(row: Tensor, batch: Batch = batch) -> Tensor:
            return directional(lambda p: model.measure(layout.tensors(p), batch), point.params, row)[1]

        together = max(1, gradients.STREAM // layout.size)
        columns.append(torch.cat([each_example(along, part) for part in moved.split(together)]).detach())
    return torch.cat(columns, dim=1).to("cpu", torch.float64)


def _adjoint(problem: Problem, steps: Sequence[int], seed: int) -> Tensor:
    """(steps, R, E) of one seed by cotangents, as many evaluation examples at a time as fit ``gradients.HELD``."""
    assert problem.further_training is not None
    removals = [tuple(r) for r in problem.removals]
    trajectory = Trajectory(problem.model, problem.train, problem.further_training, removals, seed)
    checkpoints = _Checkpoints(trajectory, steps[-1])
    values = torch.zeros(len(steps), len(removals), len(problem.evals), dtype=torch.float64)
    together = max(1, gradients.HELD // (4 * trajectory.layout.size))
    for place, last in enumerate(steps):
        for start in range(0, len(problem.evals), together):
            columns = range(start, min(start + together, len(problem.evals)))
            values[place, :, columns.start : columns.stop] = _cotangents(problem, checkpoints, last, columns)
    return values


def _cotangents(problem: Problem, checkpoints: _Checkpoints, last: int, columns: range) -> Tensor:
    trajectory = checkpoints.trajectory
    end = checkpoints.point_at(last)
    back = measure_gradients(problem.model, problem.evals, columns, trajectory.layout.tensors(end.params))
    state: State = {name: torch.zeros_like(back) for name in end.state}
    total = torch.zeros(len(trajectory.removals), len(columns), dtype=torch.float64, device=back.device)
    for point, step in checkpoints.backwards(last):
        gradient = trajectory.gradient(point, step)
        _, pull_back, *_ = vjp(trajectory.update(step.number), point.params, point.state, gradient)
        back, state, of_gradient = vmap(lambda d, s, pull=pull_back: pull((d, s)))(back, state)
        total += trajectory.change_along(point, step, of_gradient).double()
        if step.number > 1:
            back = back + trajectory.curve(point, step, of_gradient)
    return total.cpu()


class _Checkpoints:
    """The baseline read backwards: about √T points kept, and about √T more while a segment is walked."""

    def __init__(self, trajectory: Trajectory, last: int) -> None:
        self.trajectory, self._every = trajectory, max(1, math.isqrt(last))
        point = trajectory.start()
        self._kept = {0: point}
        for step in trajectory.steps():
            point = trajectory.advance(point, step)
            if step.number % self._every == 0:
                self._kept[step.number] = point
            if step.number == last:
                break

    def point_at(self, number: int) -> Point:
        """The baseline after ``number`` steps."""
        start = number - number % self._every
        if start == number:
            return self._kept[number]
        point, step = self._walk(start, number)[-1]
        return self.trajectory.advance(point, step)

    def backwards(self, last: int) -> Iterator[tuple[Point, Step]]:
        """(the baseline before the step, the step), from step ``last`` back to step 1."""
        while last > 0:
            start = (last - 1) // self._every * self._every
            yield from reversed(self._walk(start, last))
            last = start

    def _walk(self, start: int, end: int) -> list[tuple[Point, Step]]:
        """The steps after the kept point ``start`` up to ``end``, each with the baseline before it."""
        point, walked = self._kept[start], []
        for step in self.trajectory.steps(start + 1):
            walked.append((point, step))
            if step.number == end:
                break
            point = self.trajectory.advance(point, step)
        return walked
