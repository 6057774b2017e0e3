"""What an estimator is given, and what it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from fimo.estimators.declared.base import JSON
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel, Tensors
from fimo.workers.settings import FurtherTraining
from fimo.workers.start import Start

Notes: TypeAlias = dict[str, JSON]
"""What a reader needs to judge the numbers: iterations, residuals, what was left out."""


@dataclass(frozen=True)
class Problem:
    """One estimation problem.

    Attributes:
        model: the model at θᶠ; ``model.params`` are the P trainable scalars that gradients are taken of.
        train, evals: training examples 𝒟 (n) and evaluation examples (E), on the model's device and in its dtype.
        removals: training indices of each removal (R); the training-side gradient of a group is the sum over it.
        further_training: the sweep's section, for estimators that depend on the amount of further training.
        seeds: what ``unrolled`` and ``mirrored`` train with, and average over; never the sweep's own, but in a check.
        at: the recorded steps that are wanted of an estimate by amounts; None = all.
        start: what the sweep's cells share, with the engine that is proven for them, for estimators that train on it;
            None = they make it themselves.
        replicas: runs that they train together; None = measured.
        displacement: step -> Δθ̂(𝒟), the baseline's mean displacement over seeds, for ``training_gradient``.
        progress: called with one line now and then.
    """

    model: FunctionalModel
    train: Examples
    evals: Examples
    removals: Sequence[Sequence[int]]
    further_training: FurtherTraining | None = None
    seeds: Sequence[int] = ()
    at: Sequence[int] | None = None
    start: Start | None = None
    replicas: int | None = None
    displacement: Mapping[int, Tensors] | None = None
    progress: Callable[[str], None] | None = None

    def with_seeds(self, seeds: Sequence[int]) -> Problem:
        """The same, to be trained with other seeds."""
        return dataclasses.replace(self, seeds=tuple(seeds))

    def say(self, line: str) -> None:
        """Report progress, if anyone listens."""
        if self.progress is not None:
            self.progress(line)


@dataclass(frozen=True)
class Estimate:
    """An estimator's â.

    Attributes:
        values: float64 (R, E), on the CPU; (steps, R, E) if ``steps`` is given.
        steps: optimizer steps since θᶠ that the leading dimension runs over, for estimators of an amount.
        notes: see ``Notes``.
    """

    values: Tensor
    steps: tuple[int, ...] | None = None
    notes: Mapping[str, JSON] = field(default_factory=dict)
