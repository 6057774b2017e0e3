"""What an estimator is given, what it returns, and the loop over blocks of gradients that most of them share.

Estimators do no I/O and know nothing of sweeps or Ray. Invariants: an estimate is float64, ``removal × eval``; positive
means that removing the example raises g; gradients and curvature are taken at θᶠ in eval mode; the model of the problem
is as it was when an estimate returns or raises.
"""

from __future__ import annotations

import dataclasses
import traceback
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, TypeAlias

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fimo.estimators.counts import Work, of_gradients
from fimo.estimators.declared.base import JSON, Declaration
from fimo.estimators.operators.gradients import Layout, held_blocks
from fimo.estimators.operators.output_functions import is_flat
from fimo.estimators.operators.parts import Gradients
from fimo.estimators.operators.plain import plain_operations
from fimo.estimators.operators.products import Sides, sides
from fimo.estimators.operators.rows import loss_gradients, measure_gradients, removal_gradients
from fimo.workers.errors import DivergedError, WorkloadError
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


@contextmanager
def estimating(model: FunctionalModel) -> Iterator[None]:
    """Eval mode, and operations that can be vmapped and differentiated twice and forwards, for the body alone.

    Attention is by plain matrix products, in torch's transformer layers too; for the rest see ``PlainOperations``.

    Raises:
        WorkloadError: torch cannot take a derivative of an operation of the model.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with model.mode("eval"), sdpa_kernel(SDPBackend.MATH), plain_operations(model.module):
            yield
    except RuntimeError as error:
        line = not_differentiable(error)
        if line is None:
            raise
        raise WorkloadError(line) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def flat_loss(problem: Problem) -> str | None:
    """Why there is no Gauss-Newton matrix to precondition with; None if there is one."""
    with estimating(problem.model):
        flat = is_flat(problem.model, problem.train)
    return FLAT if flat else None


FLAT = (
    "the loss has no curvature in the outputs, so the Gauss-Newton matrix is 0 and the estimate would be Grad-Dot's: "
    "let outputs return the model's predictions (logits) and loss compute the loss from them"
)


def undifferentiable(problem: Problem) -> str | None:
    """Why the model's loss has no gradient that an estimator could take, told from one training example."""
    try:
        with estimating(problem.model):
            next(loss_gradients(problem.model, problem.train, [0]))
    except WorkloadError as error:
        return str(error)
    return None


CHECKPOINTING = (
    "estimators cannot differentiate through activation checkpointing (torch.utils.checkpoint): turn it off in the "
    "workload's model (model.gradient_checkpointing_disable() in transformers)"
)
NO_DERIVATIVE = (
    "estimators need a derivative that torch lacks for an operation of the model: write it with other operations, or "
    "leave this estimator out; torch says: "
)
UNDIFFERENTIABLE = {
    "saved tensor hooks": CHECKPOINTING,
    "torch.utils.checkpoint": CHECKPOINTING,
    "Checkpointing is not compatible": CHECKPOINTING,
    "CheckpointFunction": CHECKPOINTING,
    "autograd.Function with functorch transforms": NO_DERIVATIVE,
    "forward AD": NO_DERIVATIVE,
    "forward mode AD": NO_DERIVATIVE,
    "derivative for": NO_DERIVATIVE,
    "'Sparse": NO_DERIVATIVE,
    "doesn't match the broadcast shape": NO_DERIVATIVE,
    "doesn't have storage": NO_DERIVATIVE,
    "would mutate a captured Tensor": NO_DERIVATIVE,
    "vmap": NO_DERIVATIVE,
    "Batching rule": NO_DERIVATIVE,
}
"""What torch's refusals to differentiate say, and what a user can do about them."""


def not_differentiable(error: RuntimeError) -> str | None:
    """The one line for an error of torch's that says that an operation cannot be differentiated; None for others."""
    text = str(error)
    if "setup_context" in text and _inside_checkpoint(error):
        return CHECKPOINTING
    first = (text.strip().splitlines() or [""])[0]
    for words, mend in UNDIFFERENTIABLE.items():
        if words in text:
            return mend + first[:160] if mend is NO_DERIVATIVE else mend
    return None


def _inside_checkpoint(error: RuntimeError) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.filename == torch.utils.checkpoint.__file__ for frame in frames)


def finite(values: Tensor, what: str) -> Tensor:
    """``values``, float64 on the CPU.

    Raises:
        DivergedError: one of them is not finite.
    """
    if not bool(torch.isfinite(values).all()):
        raise DivergedError(f"{what}: the estimate is not finite; check the final model's losses, or raise the damping")
    return values.detach().to("cpu", torch.float64)
