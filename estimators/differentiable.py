"""What of a model can be differentiated, under which settings of torch, and what to tell if it cannot."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.utils.checkpoint
from torch.nn.attention import SDPBackend, sdpa_kernel

from fimo.estimators.operators.output_functions import is_flat
from fimo.estimators.operators.plain import plain_operations
from fimo.estimators.operators.rows import loss_gradients
from fimo.estimators.problem import Problem
from fimo.workers.errors import WorkloadError
from fimo.workers.functional import FunctionalModel


@contextmanager
def estimating(model: FunctionalModel) -> Iterator[None]:
    """Eval mode, and operations that can be vmapped and differentiated twice and forwards, for the body alone.

    Attention is by plain matrix products, in torch's transformer layers too; for the rest see ``PlainOperations``.

    Raises:
        WorkloadError: torch cannot take a derivative of an operation of the model.
    """
    try:
        with model.mode("eval"), sdpa_kernel(SDPBackend.MATH), plain_operations(model.module):
            yield
    except RuntimeError as error:
        line = not_differentiable(error)
        if line is None:
            raise
        raise WorkloadError(line) from error


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
