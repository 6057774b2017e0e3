"""What an estimator is, and the loop over blocks of gradients that most of them share.

Estimators do no I/O and know nothing of sweeps or Ray. Invariants: an estimate is float64, ``removal × eval``; positive
means that removing the example raises g; gradients and curvature are taken at θᶠ in eval mode; the model of the problem
is as it was when an estimate returns or raises.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from fimo.estimators.counts import Work, of_gradients
from fimo.estimators.declared.base import JSON, Declaration
from fimo.estimators.differentiable import estimating, undifferentiable
from fimo.estimators.operators.gradients import Layout, held_blocks
from fimo.estimators.operators.parts import Gradients
from fimo.estimators.operators.products import Sides, sides
from fimo.estimators.operators.rows import measure_gradients, removal_gradients
from fimo.estimators.problem import Estimate, Notes, Problem
from fimo.workers.errors import DivergedError
from fimo.workers.functional import Tensors


class Estimator(Protocol):
    """A named choice of preconditioner and training-side gradient; hyper-parameters are dataclass fields."""

    name: ClassVar[str]
    version: ClassVar[int]
    evals_together: ClassVar[int]
    trains: ClassVar[bool]
    units: ClassVar[str]

    def params(self) -> dict[str, JSON]:
        """Every hyper-parameter by name, defaults included: with ``name`` and ``version``, what an estimate is of."""
        ...

    def follows_training(self) -> bool:
        """Whether the values depend on the further-training section."""
        ...

    def follows_seeds(self, seeds: Sequence[int], after: int | None = None) -> tuple[int, ...]:
        """Those of the sweep's seeds that the values depend on; ``after`` as for ``runs``."""
        ...

    def runs(self, seeds: Sequence[int], after: int | None = None) -> tuple[int, ...]:
        """The seeds that the estimator itself trains with, given the sweep's: its values are the mean over them.

        ``after``: the first seed that the sweep never uses, if it may still come to use more than ``seeds``.
        """
        ...

    def work(self, problem: Problem) -> Work:
        """What the estimate has to do, counted; for a problem that the estimator does not refuse."""
        ...

    def refuses(self, problem: Problem) -> str | None:
        """Why the estimator means nothing for the problem (model, data and settings), in a line; None = it does."""
        ...

    def applies(self, problem: Problem) -> bool:
        """Whether the estimator means something for the problem."""
        ...

    def estimate(self, problem: Problem) -> Estimate:
        """The estimate for every removal and evaluation example of the problem."""
        ...


@dataclass(frozen=True)
class Hyperparameters(Declaration):
    """Base of the estimators' dataclasses: a declaration, and what an estimator does with a problem."""

    def work(self, problem: Problem) -> Work:
        """What the estimate has to do, counted: the gradients of both sides; a subclass adds what it does beyond."""
        return of_gradients(problem)

    def unsuited(self, problem: Problem) -> str | None:
        """Why the estimator means nothing for the problem, in a line; None = it does. A subclass gives its reasons."""
        return None

    def refuses(self, problem: Problem) -> str | None:
        """``unsuited``, or what keeps the model from being differentiated at all."""
        return self.unsuited(problem) or undifferentiable(problem)

    def applies(self, problem: Problem) -> bool:
        """Whether the estimator means something for the problem (a model, its data and settings)."""
        return self.refuses(problem) is None

    def refuse_unsuited(self, problem: Problem) -> None:
        """Refuse a problem (UsageError) for which the estimator means nothing."""
        reason = self.unsuited(problem)
        self.require(reason is None, reason or "")


Pair: TypeAlias = Callable[[Tensor], Tensor]
"""Training-side rows (b, P) -> their values with k evaluation examples, (b, k) or (steps, b, k)."""

TrainingSide: TypeAlias = Callable[[], Iterator[tuple[range, Tensor]]]
"""Starts a pass over the removals in blocks: (which removals, their training-side rows (b, P))."""


@dataclass(frozen=True)
class Pairing:
    """An estimator's mathematics on one problem: how evaluation and training gradients make a value.

    Attributes:
        against: evaluation gradients, rows (k, P) -> the function that pairs training-side rows with them. What depends
            on the evaluation gradients alone is done in the outer call, once a block.
        training_side: the training-side rows; None = Σ_{i∈removal} ∇ℓ_i(θᶠ).
        steps: what the leading dimension of the values runs over, if they have one.
        rows_kept: rows of P scalars that ``against`` keeps for each evaluation gradient.
    """

    against: Callable[[Tensor], Pair]
    training_side: TrainingSide | None = None
    steps: tuple[int, ...] | None = None
    rows_kept: int = 1


@dataclass(frozen=True)
class Layered:
    """An estimator's mathematics on one problem, of gradients that are kept layer by layer.

    Attributes:
        value: gradients of b training and of k evaluation examples -> their values (b, k), or (steps, b, k); a
            removal's are the sum of its examples'.
        steps: what the leading dimension of the values runs over, if they have one.
    """

    value: Callable[[Gradients, Gradients], Tensor]
    steps: tuple[int, ...] | None = None


@dataclass(frozen=True)
class GradientEstimator(Hyperparameters):
    """Base of the estimators that pair a training-side gradient with an evaluation gradient.

    The loops over blocks stand here and nowhere else; a subclass gives ``pairing``. Evaluation gradients are taken
    once; training-side gradients once as long as the evaluation gradients are ``gradients.held``, and once more for
    every further block. Large models' gradients are taken and kept layer by layer instead, if a subclass gives
    ``layered``: see ``operators.layerwise``.
    """

    by_layers: ClassVar[bool] = False
    """Whether there is ``layered``."""

    @abstractmethod
    def pairing(self, problem: Problem, notes: Notes) -> Pairing:
        """How values are made at θᶠ; what a reader should know of it goes to ``notes``."""

    def layered(self, problem: Problem, notes: Notes, both: Sides) -> Layered | None:
        """The same of a large model's gradients, layer by layer; None = by ``pairing``, with rows of P scalars."""
        return None

    def estimate(self, problem: Problem) -> Estimate:
        """(R, E), or (steps, R, E).

        Raises:
            UsageError: the estimator means nothing for the problem; see ``refuses``.
        """
        self.refuse_unsuited(problem)
        notes: Notes = {}
        model, evals = problem.model, len(problem.evals)
        with estimating(model):
            both = sides(model, problem.train, problem.evals, problem.removals) if self.by_layers else None
            layered = self.layered(problem, notes, both) if both is not None else None
            if both is not None and layered is not None:
                count = None if layered.steps is None else len(layered.steps)
                return Estimate(finite(both.values(layered.value, count), self.name), layered.steps, notes)
            pairing = self.pairing(problem, notes)
            lead = () if pairing.steps is None else (len(pairing.steps),)
            values = torch.zeros(*lead, len(problem.removals), evals, dtype=torch.float64)
            training_side = pairing.training_side or (lambda: gradients_of_removals(problem))
            for columns in held_blocks(evals, pairing.rows_kept * Layout.of(model.params).size, model.device):
                pair = pairing.against(measure_gradients(model, problem.evals, columns))
                for which, left in training_side():
                    block = pair(left).double().cpu()
                    values[..., which.start : which.stop, columns.start : columns.stop] = block
        return Estimate(finite(values, self.name), pairing.steps, notes)


def gradients_of_removals(
    problem: Problem, params: Tensors | None = None, along: Tensors | None = None
) -> Iterator[tuple[range, Tensor]]:
    """Σ_{i∈removal} ∇ℓ_i for blocks of removals, at ``params`` (or θᶠ): (which, rows (b, P)).

    ``along`` adds Σ_{i∈removal} ∇²ℓ_i times a displacement.
    """
    return removal_gradients(problem.model, problem.train, problem.removals, params, along)


def finite(values: Tensor, what: str) -> Tensor:
    """``values``, float64 on the CPU.

    Raises:
        DivergedError: one of them is not finite.
    """
    if not bool(torch.isfinite(values).all()):
        raise DivergedError(f"{what}: the estimate is not finite; check the final model's losses, or raise the damping")
    return values.detach().to("cpu", torch.float64)
