"""Estimators that train runs of their own: which seeds they train with, and that each seed is a task of its own.

The sweep's seeds are the gold standard's noise: an estimate of the same seeds shares it, and may pass the ceiling. So
the runs have seeds outside of the sweep's, and follow the sweep's own as a labelled check alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from fimo.estimators.amounts import NEEDS_TRAINING, recorded_steps, settings_of
from fimo.estimators.base import Hyperparameters
from fimo.estimators.declared import families as declared
from fimo.estimators.problem import Problem


@dataclass(frozen=True)
class OwnSeeds(declared.OwnSeeds, Hyperparameters):
    """Base of the estimators whose values are a mean over seeds that they train with.

    ``estimate`` trains with the first ``seeds`` of ``problem.seeds``, whatever these are.
    """

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
