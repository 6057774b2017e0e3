"""Estimators of an *amount* of further training: what they need of a sweep's section, and how they refuse."""

from __future__ import annotations

from fimo.estimators.base import Hyperparameters, Problem
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
