"""Grad-Cos: Grad-Dot without the gradients' lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fimo.estimators.base import Estimate, Hyperparameters, Problem, estimating, finite
from fimo.estimators.grad_dot import dot_products


@dataclass(frozen=True)
class GradCos(Hyperparameters):
    """Grad-Dot divided by the norms of both gradients (Charpiat et al. 2019, section 2): in [−1, 1]."""

    name: ClassVar[str] = "grad_cos"

    def estimate(self, problem: Problem) -> Estimate:
        """(R, E) cosines; for a group, of the summed gradient."""
        with estimating(problem.model):
            return Estimate(finite(dot_products(problem, normalise=True), self.name))
