"""Estimators that train runs of their own: which seeds they train with, and that each seed is a task of its own.

The sweep's seeds are the gold standard's noise: an estimate of the same seeds shares it, and may pass the ceiling. So
the runs have seeds outside of the sweep's, and follow the sweep's own as a labelled check alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fimo.estimators.amounts import NEEDS_TRAINING, recorded_steps, settings_of
from fimo.estimators.base import Hyperparameters, Problem


@dataclass(frozen=True)
class OwnSeeds(Hyperparameters):
    """Base of the estimators whose values are a mean over seeds that they train with.

    ``estimate`` trains with the first ``seeds`` of ``problem.seeds``, whatever these are.

    Attributes:
        seeds: how many; None = as many as the sweep has, at most ``most_seeds``.
        own_seeds: the sweep's own, the first ones: a check of the estimator, not an estimate to be scored.
        last_step: estimate no amounts beyond this step, and train no further; None = all.
    """

    most_seeds: ClassVar[int | None] = None
    """Seeds at most if their number is not given."""

    seeds: int | None = None
    own_seeds: bool = False
    last_step: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.seeds is None or self.seeds >= 1, "seeds must be at least 1")
        self.require(self.last_step is None or self.last_step >= 1, "last_step must be at least 1")

    def follows_training(self) -> bool:
        """Every step is the sweep's own."""
        return True

    def runs(self, seeds: Sequence[int], after: int | None = None) -> tuple[int, ...]:
        """Those directly after the sweep's largest, or from ``after`` on; with ``own_seeds`` the sweep's first ones."""
        count = self.seeds if self.seeds is not None else len(seeds[: self.most_seeds])
        if self.own_seeds or not seeds:
            return tuple(seeds)[:count]
        first = max(seeds) + 1 if after is None else after
        return tuple(range(first, first + count))

    def follows_seeds(self, seeds: Sequence[int], after: int | None = None) -> tuple[int, ...]:
        """``runs``: a sweep that grows into them has the values computed anew."""
        return self.runs(seeds, after)

    def unsuited(self, problem: Problem) -> str | None:
        """There is no further training, or no seed, to train with."""
        if problem.further_training is None:
            return NEEDS_TRAINING
        return None if problem.seeds else "trains runs of its own and needs at least one seed"

    def wanted_steps(self, problem: Problem) -> tuple[int, ...]:
        """The recorded steps up to ``last_step``; raises UsageError if there is none."""
        recorded = recorded_steps(problem, settings_of(self, problem))
        steps = tuple(s for s in recorded if self.last_step is None or s <= self.last_step)
        self.require(bool(steps), f"last_step lies before the first recorded step, {recorded[0]}")
        return steps
