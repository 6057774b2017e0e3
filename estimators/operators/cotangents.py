"""The adjoint of a linearised trajectory: cotangents of evaluation examples carried back from a step to θᶠ."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.func import vjp, vmap

from fimo.estimators.operators.optimizers import State
from fimo.estimators.operators.rows import measure_gradients
from fimo.estimators.operators.trajectory import Point, Step, Trajectory
from fimo.workers.examples import Examples


class Checkpoints:
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


def cotangents(checkpoints: Checkpoints, evals: Examples, last: int, columns: range) -> Tensor:
    """The removals' first-order effects on ``columns`` of the evaluation examples after step ``last``, (R, k)."""
    trajectory = checkpoints.trajectory
    end = checkpoints.point_at(last)
    back = measure_gradients(trajectory.model, evals, columns, trajectory.layout.tensors(end.params))
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
