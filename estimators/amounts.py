"""Estimators of an *amount* of further training: what they need of a sweep's section, and how they refuse."""

from __future__ import annotations

from dataclasses import dataclass

from fimo.estimators.base import GradientEstimator, Hyperparameters, Problem
from fimo.workers import batches
from fimo.workers.errors import UsageError
from fimo.workers.settings import FurtherTraining, Optimizer


def settings_of(estimator: Hyperparameters, problem: Problem) -> FurtherTraining:
    """The further-training section.

    Raises:
        UsageError: the problem has none.
    """
    if problem.further_training is None:
        raise UsageError(f"estimator {estimator.name}: depends on the amount and needs the further_training section")
    return problem.further_training


def recorded_steps(problem: Problem, settings: FurtherTraining) -> tuple[int, ...]:
    """The steps at which the sweep evaluates g, ascending."""
    return tuple(batches.steps_recorded(len(problem.train), settings))


def linear(optimizer: Optimizer) -> bool:
    """Whether a step is linear in the gradients: SGD with whatever momentum, but neither Adam nor AdamW."""
    return optimizer.name == "sgd"


@dataclass(frozen=True)
class SGDMatched(GradientEstimator):
    """Base of the influence functions matched to the amount of further training: SGD alone, unclipped."""

    def follows_training(self) -> bool:
        """The optimizer and the recorded steps decide the values."""
        return True

    def applies(self, problem: Problem) -> bool:
        """Whether further training is SGD, unclipped."""
        settings = problem.further_training
        return settings is not None and linear(settings.optimizer) and settings.clip_norm is None

    def followed(self, problem: Problem) -> tuple[FurtherTraining, tuple[int, ...]]:
        """The further-training section and its recorded steps.

        Raises:
            UsageError: no further-training section, another optimizer than SGD, or clipping.
        """
        settings = settings_of(self, problem)
        self.require(linear(settings.optimizer), "follows SGD alone, not " + settings.optimizer.name)
        self.require(settings.clip_norm is None, "clipping is not linear; leave clip_norm out or use unrolled")
        return settings, recorded_steps(problem, settings)
