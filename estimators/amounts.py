"""Estimators of an *amount* of further training: what they need of a sweep's section, and how they refuse."""

from __future__ import annotations

from dataclasses import dataclass

from fimo.estimators.base import GradientEstimator, Hyperparameters
from fimo.estimators.declared import families as declared
from fimo.estimators.differentiable import flat_loss
from fimo.estimators.problem import Problem
from fimo.workers.amounts import steps_recorded
from fimo.workers.errors import UsageError
from fimo.workers.settings import FurtherTraining, Optimizer

NEEDS_TRAINING = "depends on the amount and needs the further_training section"


def settings_of(estimator: Hyperparameters, problem: Problem) -> FurtherTraining:
    """The further-training section.

    Raises:
        UsageError: the problem has none.
    """
    if problem.further_training is None:
        raise UsageError(f"estimator {estimator.name}: {NEEDS_TRAINING}")
    return problem.further_training


def recorded_steps(problem: Problem, settings: FurtherTraining) -> tuple[int, ...]:
    """The steps at which the sweep evaluates g, ascending: all, or those that the problem asks for.

    Raises:
        UsageError: it asks for none of them.
    """
    every = tuple(steps_recorded(len(problem.train), settings))
    if problem.at is None:
        return every
    wanted = tuple(step for step in every if step in set(problem.at))
    if not wanted:
        raise UsageError(f"none of the steps {list(problem.at)[:10]} is recorded; the sweep has {list(every)[:10]}")
    return wanted


def linear(optimizer: Optimizer) -> bool:
    """Whether a step is linear in the gradients: SGD with whatever momentum, but neither Adam nor AdamW."""
    return optimizer.name == "sgd"


@dataclass(frozen=True)
class SGDMatched(declared.SGDMatched, GradientEstimator):
    """Base of the influence functions matched to the amount of further training: SGD alone, unclipped."""

    def unsuited(self, problem: Problem) -> str | None:
        """Further training is not unclipped SGD, or the loss has no curvature in the outputs."""
        settings = problem.further_training
        if settings is None:
            return NEEDS_TRAINING
        if not linear(settings.optimizer):
            return "follows SGD alone, not " + settings.optimizer.name
        if settings.clip_norm is not None:
            return "clipping is not linear; leave clip_norm out or use unrolled"
        return super().unsuited(problem) or flat_loss(problem)

    def followed(self, problem: Problem) -> tuple[FurtherTraining, tuple[int, ...]]:
        """The further-training section and its recorded steps."""
        settings = settings_of(self, problem)
        return settings, recorded_steps(problem, settings)
