"""torch's SGD, Adam and AdamW as pure functions of rows, so that a step can be differentiated.

One step is (θ, state, g, t) ↦ (θ', state'), elementwise but for the clipping of the whole gradient's norm; equal to
torch's own optimizers to rounding. Not covered: parameters that the loss does not depend on, which torch's
optimizers skip and which here see a zero gradient; nothing that is estimated depends on them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fimo.workers.settings import Optimizer

State = dict[str, Tensor]
"""The optimizer's own rows (…, P) by name."""


def fresh_state(optimizer: Optimizer, params: Tensor) -> State:
    """The state before the first step: zeros."""
    names = ["average"] if optimizer.name == "sgd" and optimizer.momentum else []
    if optimizer.name != "sgd":
        names = ["average", "square", *(["largest"] if optimizer.amsgrad else [])]
    return {name: torch.zeros_like(params) for name in names}


def clipped(gradient: Tensor, max_norm: float | None) -> Tensor:
    """As ``torch.nn.utils.clip_grad_norm_``, over each row (…, P)."""
    if max_norm is None:
        return gradient
    squares = gradient.square().sum(dim=-1, keepdim=True)
    scale: Tensor = (max_norm / (_root(squares) + 1e-6)).clamp(max=1.0)
    return gradient * scale


def step(
    optimizer: Optimizer, max_norm: float | None, number: int, params: Tensor, state: State, gradient: Tensor
) -> tuple[Tensor, State]:
    """(θ', state') after step ``number`` ≥ 1 with the gradient of the step's loss; rows (…, P), each its own run."""
    gradient = clipped(gradient, max_norm)
    if optimizer.name == "sgd":
        return _sgd(optimizer, number, params, state, gradient)
    return _adam(optimizer, number, params, state, gradient)


def _sgd(o: Optimizer, number: int, params: Tensor, state: State, gradient: Tensor) -> tuple[Tensor, State]:
    direction = gradient + o.weight_decay * params if o.weight_decay else gradient
    if o.momentum:
        average = direction if number == 1 else o.momentum * state["average"] + (1 - o.dampening) * direction
        direction = direction + o.momentum * average if o.nesterov else average
        state = {"average": average}
    return params - o.lr * direction, state


def _adam(o: Optimizer, number: int, params: Tensor, state: State, gradient: Tensor) -> tuple[Tensor, State]:
    if o.weight_decay and o.name == "adamw":
        params = params * (1 - o.lr * o.weight_decay)
    elif o.weight_decay:
        gradient = gradient + o.weight_decay * params
    first, second = o.betas
    after = {
        "average": first * state["average"] + (1 - first) * gradient,
        "square": second * state["square"] + (1 - second) * gradient.square(),
    }
    scale = after["square"]
    if o.amsgrad:
        scale = after["largest"] = torch.maximum(state["largest"], scale)
    denominator = _root(scale) / (1 - second**number) ** 0.5 + o.eps
    return params - o.lr / (1 - first**number) * after["average"] / denominator, after


def _root(squares: Tensor) -> Tensor:
    """√x with derivative 0 at 0, for a gradient that is exactly zero would make it infinite."""
    zero = squares == 0
    return torch.where(zero, 0, torch.where(zero, 1, squares).sqrt())


class Descent:
    """SGD on rows x (k, d) from a start, given gradients of a quadratic: the recursion of the matched estimators."""

    def __init__(self, optimizer: Optimizer, x: Tensor) -> None:
        self.x, self._optimizer = x, optimizer
        self._momentum: Tensor | None = None

    def step(self, gradient: Tensor) -> None:
        """One step; weight decay is added to the gradient."""
        o = self._optimizer
        direction = gradient + o.weight_decay * self.x
        if o.momentum:
            was = self._momentum
            average = direction if was is None else o.momentum * was + (1 - o.dampening) * direction
            direction = direction + o.momentum * average if o.nesterov else average
            self._momentum = average
        self.x = self.x - o.lr * direction
