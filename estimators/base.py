"""What an estimator is given and what it returns; estimators do no I/O and know nothing of sweeps or Ray.

Invariants: an estimate is float64, ``removal × eval``; positive means that removing the example raises g;
gradients and curvature are taken at θᶠ in eval mode; the model of the problem is as it was when an estimate
returns or raises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from fimo.workers.errors import DivergedError, UsageError
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel, Tensors
from fimo.workers.settings import FurtherTraining
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

JSON: TypeAlias = "str | int | float | bool | Sequence[JSON] | Mapping[str, JSON] | None"


@dataclass(frozen=True)
class Problem:
    """One estimation problem.

    Attributes:
        model: the model at θᶠ; ``model.params`` are the P trainable scalars that gradients are taken of.
        train, evals: training examples 𝒟 (n) and evaluation examples (E), on the model's device and in its
            dtype.
        removals: training indices of each removal (R); the training-side gradient of a group is the sum over
            it.
        further_training: the sweep's section, for estimators that depend on the amount of further training.
        seeds: the sweep's seeds, for ``unrolled``, which averages over them.
        displacement: step -> Δθ̂(𝒟), the baseline's mean displacement over seeds, for ``training_gradient``.
        progress: called with one line now and then.
    """

    model: FunctionalModel
    train: Examples
    evals: Examples
    removals: Sequence[Sequence[int]]
    further_training: FurtherTraining | None = None
    seeds: Sequence[int] = ()
    displacement: Mapping[int, Tensors] | None = None
    progress: Callable[[str], None] | None = None

    def say(self, line: str) -> None:
        """Report progress, if anyone listens."""
        if self.progress is not None:
            self.progress(line)


@dataclass(frozen=True)
class Estimate:
    """An estimator's â.

    Attributes:
        values: float64 (R, E), on the CPU; (steps, R, E) where ``steps`` is given.
        steps: optimizer steps since θᶠ that the leading dimension runs over, for estimators of an amount.
        notes: what a reader needs to judge the numbers: iterations, residuals, what was left out.
    """

    values: Tensor
    steps: tuple[int, ...] | None = None
    notes: Mapping[str, JSON] = field(default_factory=dict)


class Estimator(Protocol):
    """A named choice of preconditioner and training-side gradient; hyper-parameters are dataclass fields."""

    name: ClassVar[str]

    def params(self) -> dict[str, JSON]:
        """Every hyper-parameter by name, defaults included: with ``name``, the identity of an estimate."""
        ...

    def applies(self, problem: Problem) -> bool:
        """Whether the estimator means something for the problem's model."""
        ...

    def estimate(self, problem: Problem) -> Estimate:
        """The estimate for every removal and evaluation example of the problem."""
        ...


@dataclass(frozen=True)
class Hyperparameters:
    """Base of the estimators' dataclasses: their fields are their hyper-parameters and nothing else is."""

    name: ClassVar[str]

    def params(self) -> dict[str, JSON]:
        """Every hyper-parameter by name, defaults included."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def applies(self, problem: Problem) -> bool:
        """Whether the estimator means something for the problem (a model, its data and settings)."""
        return True

    def require(self, condition: bool, message: str) -> None:
        """Refuse a hyper-parameter.

        Raises:
            UsageError: ``condition`` is false; the message is prefixed with the estimator's name.
        """
        if not condition:
            raise UsageError(f"estimator {self.name}: {message}")

    def settle(self, **values: Any) -> None:
        """Set fields of the frozen dataclass, in ``__post_init__`` alone."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


@contextmanager
def estimating(model: FunctionalModel) -> Iterator[None]:
    """Eval mode, and attention that can be differentiated twice and forwards (math), for the body alone."""
    with model.mode("eval"), sdpa_kernel(SDPBackend.MATH):
        yield


def finite(values: Tensor, what: str) -> Tensor:
    """``values``, float64 on the CPU.

    Raises:
        DivergedError: one of them is not finite.
    """
    if not bool(torch.isfinite(values).all()):
        raise DivergedError(f"{what}: the estimate is not finite; check the final model's losses, or raise the damping")
    return values.detach().to("cpu", torch.float64)
