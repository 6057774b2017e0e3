"""Grad-Cos: Grad-Dot without the gradients' lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fimo.estimators.base import GradientEstimator, Notes, Pairing, Problem
from fimo.estimators.operators.gradients import cosines


@dataclass(frozen=True)
class GradCos(GradientEstimator):
    """Grad-Dot divided by the norms of both gradients (Charpiat et al. 2019, section 2): in [−1, 1].

    A group's norm is that of its summed gradient. A gradient of norm 0 gives 0.
    """

    name: ClassVar[str] = "grad_cos"

    def pairing(self, problem: Problem, notes: Notes) -> Pairing:
        """Cosines."""
        return Pairing(lambda right: lambda left: cosines(left, right))
