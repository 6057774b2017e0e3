"""Grad-Cos: Grad-Dot without the gradients' lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fimo.estimators.base import GradientEstimator, Layered, Pairing
from fimo.estimators.declared import shipped as declared
from fimo.estimators.operators.gradients import dot_products, units
from fimo.estimators.operators.products import Sides, cosines
from fimo.estimators.operators.rows import removal_gradients
from fimo.estimators.problem import Notes, Problem


@dataclass(frozen=True)
class GradCos(declared.GradCos, GradientEstimator):
    """Grad-Dot divided by the norms of both gradients (Charpiat et al. 2019, section 2): in [−1, 1] for one example.

    The cosine is defined between two examples, so a group's value is the sum of its members' cosines, as an attribution
    of groups is in the linear datamodeling score. A gradient of norm 0 gives 0.
    """

    by_layers: ClassVar[bool] = True

    def pairing(self, problem: Problem, notes: Notes) -> Pairing:
        """Inner products of gradients of norm 1."""

        def training_side() -> Iterator[tuple[range, Tensor]]:
            return removal_gradients(problem.model, problem.train, problem.removals, unit=True)

        return Pairing(lambda right: lambda left: dot_products(left, units(right)), training_side)

    def layered(self, problem: Problem, notes: Notes, both: Sides) -> Layered:
        """The same, layer by layer."""
        return Layered(lambda left, right: cosines(left, right, both.like))
