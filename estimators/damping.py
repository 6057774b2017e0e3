"""λ, the multiple of the identity that makes a curvature invertible: matched to the amount, absolute or relative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fimo.estimators.amounts import NEEDS_TRAINING, recorded_steps, settings_of
from fimo.estimators.base import Hyperparameters
from fimo.estimators.counts import Work
from fimo.estimators.declared import families as declared
from fimo.estimators.matching import Shift, matched, of_scale, spread
from fimo.estimators.operators.gradients import Layout, held
from fimo.estimators.operators.layerwise import layerwise
from fimo.estimators.operators.products import mean_squares
from fimo.estimators.operators.rows import mean_square
from fimo.estimators.problem import Problem


@dataclass(frozen=True)
class Damped(declared.Damped, Hyperparameters):
    """Base of the estimators with a damping λ."""

    solved: ClassVar[int | None] = None
    """How many recorded steps are solved for at most, evenly in log t; None = all."""

    def unsuited(self, problem: Problem) -> str | None:
        """A matched λ needs further training to match."""
        if self.is_matched and problem.further_training is None:
            return f"matched damping {NEEDS_TRAINING}; or give damping"
        return super().unsuited(problem)

    def amounts(self, problem: Problem) -> tuple[int, ...] | None:
        """The steps that there is an estimate for; None = one for every amount."""
        if not self.is_matched:
            return None
        steps = recorded_steps(problem, settings_of(self, problem))
        return steps if self.solved is None else spread(steps, self.solved)

    def work(self, problem: Problem) -> Work:
        """The optimizer's scale, or the mean squared gradient entry, is a pass over 𝒟."""
        own = super().work(problem)
        if self.is_matched:
            return own + of_scale(problem)
        return own if self.damping is not None else own + Work(gradients=float(len(problem.train)))

    def shift(self, problem: Problem) -> Shift:
        """λ of every system to solve; see ``Shift``. A relative one costs a pass of per-example gradients over 𝒟."""
        steps = self.amounts(problem)
        if steps is None:
            return Shift((self.resolve_damping(problem),))
        return matched(problem, settings_of(self, problem), steps)

    def resolve_damping(self, problem: Problem) -> float:
        """The one λ of all amounts."""
        if isinstance(self.damping, int | float):
            return self.damping
        assert self.damping_scale is not None
        model = problem.model
        sizes = [shape.numel() for shape in Layout.of(model.params).shapes.values()]
        way = layerwise(model, model.loss, problem.train)
        if way is None:
            squares = mean_square(model, problem.train)
        else:
            squares = mean_squares(
                way.gradients(range(len(problem.train)), held(model.device) // 4), next(iter(model.params.values()))
            )
        weights = torch.tensor(sizes, dtype=torch.float64, device=squares.device)
        return self.damping_scale * float((squares * weights).sum() / weights.sum())
