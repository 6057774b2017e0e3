"""λ, the multiple of the identity that makes a curvature invertible: matched to the amount, absolute or relative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fimo.estimators.amounts import NEEDS_TRAINING, recorded_steps, settings_of
from fimo.estimators.base import Hyperparameters, Problem
from fimo.estimators.counts import Work
from fimo.estimators.matching import Shift, matched, of_scale, spread
from fimo.estimators.operators.gradients import Layout, held
from fimo.estimators.operators.layerwise import layerwise
from fimo.estimators.operators.products import mean_squares
from fimo.estimators.operators.rows import mean_square


@dataclass(frozen=True)
class Damped(Hyperparameters):
    """Base of the estimators with a damping λ.

    Attributes:
        damping: λ itself, ≥ 0; or ``matched``: 1/(ηt) for each recorded step t (see ``matching``), so that there is an
            estimate for each.
        damping_scale: λ as a multiple of the mean squared entry of the per-example training gradients over
            all of 𝒟 and all parameters (Grosse et al. 2023, section 5.1, for the scale). At most one of the
            two is given; neither means matched where the estimator can be, else its ``default_scale``.
    """

    default_scale: ClassVar[float] = 1.0
    matches: ClassVar[bool] = False
    """Whether the estimator can be matched."""
    solved: ClassVar[int | None] = None
    """How many recorded steps are solved for at most, evenly in log t; None = all."""

    damping: float | Literal["matched"] | None = None
    damping_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.damping is None or self.damping_scale is None,
            "give damping (matched, or λ itself) or damping_scale (times the mean squared gradient entry), not both",
        )
        self.require(self.matches or self.damping != "matched", "damping cannot be matched; give a number")
        self.require(not isinstance(self.damping, int | float) or self.damping >= 0, "damping must be at least 0")
        self.require(self.damping_scale is None or self.damping_scale >= 0, "damping_scale must be at least 0")
        if self.damping is None and self.damping_scale is None:
            self.settle(**({"damping": "matched"} if self.matches else {"damping_scale": self.default_scale}))

    @property
    def is_matched(self) -> bool:
        """Whether there is a λ for each recorded step."""
        return self.damping == "matched"

    def follows_training(self) -> bool:
        """A matched λ is of the optimizer and the amount."""
        return self.is_matched or super().follows_training()

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
