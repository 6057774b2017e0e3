"""λ, the multiple of the identity that makes a curvature invertible: absolute or relative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fimo.estimators.base import Hyperparameters, Problem
from fimo.estimators.operators.gradients import Layout, mean_square


@dataclass(frozen=True)
class Damped(Hyperparameters):
    """Base of the estimators with a damping λ.

    Attributes:
        damping: λ itself, ≥ 0.
        damping_scale: λ as a multiple of the mean squared entry of the per-example training gradients over
            all of 𝒟 and all parameters (Grosse et al. 2023, section 5.1, for the scale). At most one of the
            two is given; neither means the estimator's ``default_scale``.
    """

    default_scale: ClassVar[float] = 1.0

    damping: float | None = None
    damping_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.damping is None or self.damping_scale is None,
            "give damping (λ itself) or damping_scale (times the mean squared gradient entry), not both",
        )
        self.require(self.damping is None or self.damping >= 0, "damping must be at least 0")
        self.require(self.damping_scale is None or self.damping_scale >= 0, "damping_scale must be at least 0")
        if self.damping is None and self.damping_scale is None:
            self.settle(damping_scale=self.default_scale)

    def resolve_damping(self, problem: Problem) -> float:
        """λ for this problem; a relative one costs a pass of per-example gradients over 𝒟."""
        if self.damping is not None:
            return self.damping
        assert self.damping_scale is not None
        model = problem.model
        sizes = [shape.numel() for shape in Layout.of(model.params).shapes.values()]
        squares = mean_square(model, problem.train)
        weights = torch.tensor(sizes, dtype=torch.float64, device=squares.device)
        return self.damping_scale * float((squares * weights).sum() / weights.sum())
