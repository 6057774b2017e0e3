"""What a model's training-mode forward does, found by running it at θᶠ rather than by the names of its layers.

Covers what one forward on the first examples shows. A buffer that changes later only, or state kept outside
parameters and buffers, is not seen here (the first is refused by ``further_train`` when it happens).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from fimo.workers.device import seed
from fimo.workers.errors import WorkloadError
from fimo.workers.examples import Batch, Examples, shapes
from fimo.workers.functional import FunctionalModel, Tensors
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Traits:
    """How the forward behaves in the mode that further training runs it in.

    Attributes:
        mutable: buffers that it changes (batch norm's statistics): each replica owns its own.
        coupled: whether one example's loss depends on the others in its batch (batch norm).
        random: whether it draws random numbers (dropout).
        independent: whether it is proven to treat examples one by one: each example's loss alone, under ``vmap``
            (which refuses decisions that depend on data), is its loss in the batch. False where this cannot be told.
        used: parameters that the loss depends on; torch's optimizers skip the others.
    """

    mutable: tuple[str, ...]
    coupled: bool
    random: bool
    independent: bool
    used: tuple[str, ...]


def traits(model: FunctionalModel, train: Examples, size: int, mode: Literal["train", "eval"]) -> Traits:
    """Probe the forward on the first ``size`` training examples; torch's random state is left as it was.

    Raises:
        WorkloadError: the loss depends on no trainable parameter.
    """
    first = list(range(min(len(train), size)))
    batch = train.batch(first)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), model.mode(mode):
        losses, buffers = _losses(model, batch, 0)
        # A draw that changed nothing this time (stochastic depth) is a draw.
        draws = not torch.equal(_random_state(model.device), _seeded_state(model.device))
        again, _ = _losses(model, batch, 1)
        coupled = mode == "train" and _has_batch_norm(model)
        other = train.batch([len(train) - 1, *first[1:]])
        if not coupled and shapes(other) == shapes(batch):
            replaced, _ = _losses(model, other, 0)
            coupled = not torch.allclose(replaced[1:], losses[1:], rtol=1e-4, atol=1e-6, equal_nan=True)
        random = draws or not torch.equal(again.nan_to_num(), losses.nan_to_num())
        independent = not (coupled or random) and _one_by_one(model, batch, losses)
        used = _used(model, batch)
    mutable = tuple(n for n, t in buffers.items() if not torch.equal(t, model.fixed[n]))
    return Traits(mutable, coupled, random, independent and not mutable, used)


def _random_state(device: torch.device) -> Tensor:
    cpu = torch.random.get_rng_state()
    return torch.cat([cpu, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else cpu


def _seeded_state(device: torch.device) -> Tensor:
    seed(0, device)
    return _random_state(device)


@torch.no_grad()
def _losses(model: FunctionalModel, batch: Batch, value: int) -> tuple[Tensor, Tensors]:
    buffers = {n: t.clone() for n, t in model.fixed.items()}
    seed(value, model.device)
    return model.loss(model.params, batch, buffers), buffers


@torch.no_grad()
def _one_by_one(model: FunctionalModel, batch: Batch, losses: Tensor) -> bool:
    def one(example: Batch) -> Tensor:
        alone = pytree.tree_map(lambda t: t.unsqueeze(0), example)
        return model.loss(model.params, alone, dict(model.fixed))[0]

    try:
        alone: Tensor = vmap(one)(batch)
    except Exception:
        # Whatever the model objects to, the answer is the same: nothing is proven.
        return False
    return torch.allclose(alone, losses, rtol=1e-4, atol=1e-6, equal_nan=True)


def _has_batch_norm(model: FunctionalModel) -> bool:
    kinds = torch.nn.modules.batchnorm._BatchNorm
    return any(isinstance(m, kinds) for m in model.module.modules())


def _used(model: FunctionalModel, batch: Batch) -> tuple[str, ...]:
    params = {n: p.detach().requires_grad_() for n, p in model.params.items()}
    with torch.enable_grad():
        total = model.loss(params, batch, {n: t.clone() for n, t in model.fixed.items()}).sum()
    grads: tuple[Tensor | None, ...] = (None,) * len(params)
    if total.requires_grad:
        grads = torch.autograd.grad(total, list(params.values()), allow_unused=True)
    used = tuple(n for n, g in zip(params, grads, strict=True) if g is not None)
    if not used:
        raise WorkloadError(
            "the loss depends on no trainable parameter: outputs(model, batch) must call the model that it is given"
        )
    return used
