"""Replicas of one model stacked along a first dimension and stepped together.

A stack of one is run without ``vmap``: for convolutions on a CPU stacking is slower than one at a time, and a model
that cannot be vmapped at all still trains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from workers.batches import Block
from workers.examples import Batch, Examples, shapes, stack
from workers.functional import FunctionalModel, Tensors
from workers.settings import Optimizer


def mutable_buffers(model: FunctionalModel, batch: Batch) -> list[str]:
    """Names of the buffers that a training-mode forward changes: each replica owns its own (batch norm's statistics)."""
    trial = {n: t.clone() for n, t in model.fixed.items()}
    with torch.no_grad(), model.mode("train"):
        model.outputs(model.params, batch, trial)
    return [n for n, t in trial.items() if not torch.equal(t, model.fixed[n])]


def is_coupled(model: FunctionalModel) -> bool:
    """Whether a training-mode forward mixes the examples of a batch: batch norm, by its type."""
    kinds = torch.nn.modules.batchnorm._BatchNorm
    return any(isinstance(m, kinds) for m in model.module.modules())


def stacked(tensors: Tensors, count: int) -> Tensors:
    """``count`` copies of each tensor along a new first dimension."""
    return {n: t.detach().expand(count, *t.shape).clone() for n, t in tensors.items()}


def make_optimizer(settings: Optimizer, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    """torch's own optimizer over the stacked parameters.

    SGD, Adam and AdamW are elementwise, so one optimizer over a stack is exactly one optimizer a replica.
    """
    if settings.name == "sgd":
        return torch.optim.SGD(
            params,
            lr=settings.lr,
            momentum=settings.momentum,
            dampening=settings.dampening,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
        )
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(
        params,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        amsgrad=settings.amsgrad,
    )


def clip(grads: Sequence[Tensor | None], max_norm: float) -> None:
    """Clip each replica's own gradient in place, as ``torch.nn.utils.clip_grad_norm_`` does for one model."""
    present = [g for g in grads if g is not None]
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in present]).norm(dim=0)
    scale = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for g in present:
        g.mul_(scale.view(-1, *[1] * (g.ndim - 1)))


def fetch(train: Examples, block: Block) -> list[tuple[tuple[int, ...], Batch, Tensor, bool]]:
    """The block's batches: (lanes, batch, weights, shared); lanes whose batches differ in shape are parted."""
    if block.indices.ndim == 1:
        return [(block.lanes, train.batch(block.indices), block.weights, True)]
    if train.tensors is not None:
        return [(block.lanes, train.batch(block.indices), block.weights, False)]
    alike: dict[object, list[tuple[int, Batch, Tensor]]] = {}
    for lane, indices, weights in zip(block.lanes, block.indices, block.weights, strict=True):
        batch = train.batch(indices)
        alike.setdefault(shapes(batch), []).append((lane, batch, weights))
    return [
        (tuple(x[0] for x in rows), stack([x[1] for x in rows]), torch.stack([x[2] for x in rows]), False)
        for rows in alike.values()
    ]


def losses(model: FunctionalModel, params: Tensors, buffers: Tensors, batch: Batch, shared: bool) -> Tensor:
    """Per-example losses of stacked replicas, (R, b).

    Args:
        params, buffers: stacked (R, …); ``buffers`` are updated in place by a training-mode forward.
        batch: shared by the replicas, or stacked (R, b, …).
    """

    def one(p: Tensors, b: Tensors, x: Batch) -> Tensor:
        return model.loss(p, x, {**model.fixed, **b})

    count = next(iter(params.values())).shape[0]
    if count == 1:
        own = batch if shared else _first(batch)
        return one(_first(params), _first(buffers), own).unsqueeze(0)
    out: Tensor = vmap(one, in_dims=(0, 0, None if shared else 0), randomness="same")(params, buffers, batch)
    return out


def measures(model: FunctionalModel, params: Tensors, buffers: Tensors, batch: Batch) -> Tensor:
    """g(z, θ_r) of stacked replicas on a shared evaluation batch, float64 (R, m)."""

    def one(p: Tensors, b: Tensors) -> Tensor:
        return model.measure(p, batch, {**model.fixed, **b})

    count = next(iter(params.values())).shape[0]
    if count == 1:
        return one(_first(params), _first(buffers)).unsqueeze(0)
    out: Tensor = vmap(one, in_dims=(0, 0), randomness="same")(params, buffers)
    return out


def take(tensors: Tensors, lanes: tuple[int, ...], count: int) -> Tensors:
    """The given lanes of stacked tensors: the tensors themselves where that is all of them, in order."""
    if lanes == tuple(range(count)):
        return tensors
    if lanes == tuple(range(lanes[0], lanes[-1] + 1)):
        return {n: t[lanes[0] : lanes[-1] + 1] for n, t in tensors.items()}
    index = torch.tensor(lanes)
    return {n: t[index.to(t.device)] for n, t in tensors.items()}


def put_back(into: Tensors, part: Tensors, lanes: tuple[int, ...]) -> None:
    """Write lanes taken by ``take`` back; nothing to do for those that are views."""
    for name, tensor in part.items():
        if tensor is not into[name]:
            into[name][list(lanes)] = tensor


def _first(batch: Batch) -> Batch:
    return pytree.tree_map(lambda t: t[0] if isinstance(t, Tensor) else t, batch)
