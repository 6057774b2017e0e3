"""Replicas of one model stacked along a first dimension and stepped together.

A stack of one is run without ``vmap``: for convolutions on a CPU stacking is slower than one at a time, and a model
that cannot be vmapped at all still trains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fimo.workers.batches import Block
from fimo.workers.errors import WorkloadError
from fimo.workers.examples import Batch, Examples, shapes, stack
from fimo.workers.functional import CHANGED_LATE, FunctionalModel, Tensors
from fimo.workers.settings import Optimizer
from fimo.workers.stacking.agreement import ReplicasAgree
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

Gradients = dict[str, Tensor | None]
"""Stacked gradients by the parameters' names; None where the loss does not depend on the parameter."""


def stacked(tensors: Tensors, count: int) -> Tensors:
    """``count`` copies of each tensor along a new first dimension."""
    return {n: t.detach().expand(count, *t.shape).clone() for n, t in tensors.items()}


def make_optimizer(settings: Optimizer, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    """torch's own optimizer over the stacked parameters.

    SGD, Adam and AdamW are elementwise, so one optimizer over a stack is exactly one optimizer a replica.
    """
    foreach = params[0].device.type == "cuda"
    if settings.name == "sgd":
        return torch.optim.SGD(
            params,
            lr=settings.lr,
            momentum=settings.momentum,
            dampening=settings.dampening,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
            foreach=foreach,
        )
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(
        params,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        amsgrad=settings.amsgrad,
        foreach=foreach,
    )


def clip(grads: Gradients, max_norm: float) -> Gradients:
    """Each replica's own gradient clipped as ``torch.nn.utils.clip_grad_norm_`` clips one model's."""
    present = {n: g for n, g in grads.items() if g is not None}
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in present.values()]).norm(dim=0)
    scale = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    # Not in place: autograd gives two parameters that are added up the same tensor.
    return {**grads, **{n: g * scale.view(-1, *[1] * (g.ndim - 1)) for n, g in present.items()}}


def fetch(train: Examples, block: Block) -> list[tuple[tuple[int, ...], Batch, Tensor, bool]]:
    """The block's batches: (lanes, batch, weights, shared); lanes whose batches differ in shape are parted."""
    if block.indices.ndim == 1:
        return [(block.lanes, train.batch(block.indices), block.weights, True)]
    if train.tensors is not None:
        return [(block.lanes, train.batch(block.indices), block.weights, False)]
    alike: dict[object, list[tuple[int, Batch, Tensor]]] = {}
    every_weights = block.weights.expand(len(block.lanes), -1)
    for lane, indices, weights in zip(block.lanes, block.indices, every_weights, strict=True):
        batch = train.batch(indices)
        alike.setdefault(shapes(batch), []).append((lane, batch, weights))
    return [
        (tuple(x[0] for x in rows), stack([x[1] for x in rows]), torch.stack([x[2] for x in rows]), False)
        for rows in alike.values()
    ]


def gradients(
    model: FunctionalModel, params: Tensors, buffers: Tensors, batch: Batch, weights: Tensor, shared: bool
) -> tuple[Gradients, Tensors]:
    """Each replica's own ∇_θ Σ_j w_j ℓ_j(θ), stacked, and the buffers after its forward.

    Replicas share no parameter, so the gradient of the sum over replicas is each replica's own.

    Args:
        params, buffers: stacked (R, …); left as they are.
        batch: b examples that the replicas share, or stacked (R, b, …).
        weights: w, (b,) or (R, b).

    Returns:
        (gradients by name, None where the loss does not depend on the parameter; new buffers).
    """
    own = {n: p.detach().requires_grad_() for n, p in params.items()}
    with torch.enable_grad():
        each, after = losses(model, own, {n: b.clone() for n, b in buffers.items()}, batch, shared)
        total = (each * weights.to(each)).sum()
    grads = torch.autograd.grad(total, list(own.values()), allow_unused=True)
    return dict(zip(own, grads, strict=True)), {n: t.detach() for n, t in after.items()}


def losses(
    model: FunctionalModel, params: Tensors, buffers: Tensors, batch: Batch, shared: bool
) -> tuple[Tensor, Tensors]:
    """Per-example losses of stacked replicas, (R, b), and the buffers after the forward.

    Args:
        params, buffers: stacked (R, …); a forward may update ``buffers`` in place.
        batch: shared by the replicas, or stacked (R, b, …).

    Raises:
        WorkloadError: the forward replaced a buffer that the probe of the first batch found constant.
    """

    def one(p: Tensors, b: Tensors, x: Batch) -> tuple[Tensor, Tensors]:
        fixed = {**model.fixed, **b}
        each = model.loss(p, x, fixed)
        for name, tensor in model.fixed.items():
            if name not in b and fixed[name] is not tensor:
                raise WorkloadError(f"buffer '{name}' {CHANGED_LATE}")
        return each, {n: fixed[n] for n in b}

    count = next(iter(params.values())).shape[0]
    if count == 1:
        each, after = one(_first(params), _first(buffers), batch if shared else _first(batch))
        return each.unsqueeze(0), {n: t.unsqueeze(0) for n, t in after.items()}
    stacked_one = vmap(one, in_dims=(0, 0, None if shared else 0), randomness="same")
    with ReplicasAgree():
        out: tuple[Tensor, Tensors] = stacked_one(params, buffers, batch)
    return out


def measures(model: FunctionalModel, params: Tensors, buffers: Tensors, batch: Batch) -> Tensor:
    """g(z, θ_r) of stacked replicas on a shared evaluation batch, float64 (R, m)."""

    def one(p: Tensors, b: Tensors) -> Tensor:
        return model.measure(p, batch, {**model.fixed, **b})

    count = next(iter(params.values())).shape[0]
    if count == 1:
        return one(_first(params), _first(buffers)).unsqueeze(0)
    with ReplicasAgree():
        out: Tensor = vmap(one, in_dims=(0, 0), randomness="same")(params, buffers)
    return out


def take(tensors: Tensors, lanes: tuple[int, ...], count: int) -> Tensors:
    """The given lanes of stacked tensors: the tensors themselves where that is all of them, in order."""
    if lanes == tuple(range(count)):
        return tensors
    return {n: t[_places(lanes)] for n, t in tensors.items()}


def _places(lanes: tuple[int, ...]) -> slice | list[int]:
    """What indexes the lanes: a slice, and so a view, where they are neighbours."""
    return slice(lanes[0], lanes[-1] + 1) if lanes == tuple(range(lanes[0], lanes[-1] + 1)) else list(lanes)


def put_back(into: Tensors, part: Tensors, lanes: tuple[int, ...]) -> None:
    """Write the given lanes of stacked tensors."""
    for name, tensor in part.items():
        into[name][_places(lanes)] = tensor


def add(into: Gradients, part: Gradients, lanes: tuple[int, ...], count: int) -> None:
    """Add the gradients of the given lanes to those of the stack of ``count``; None adds nothing."""
    everyone = lanes == tuple(range(count))
    for name, grad in part.items():
        total = into.get(name)
        if grad is None:
            into[name] = total
        elif total is None and everyone:
            into[name] = grad
        else:
            # A copy: autograd gives two parameters that are added up the same tensor.
            total = grad.new_zeros(count, *grad.shape[1:]) if total is None else total.clone()
            total[_places(lanes)] += grad
            into[name] = total


def _first(batch: Batch) -> Batch:
    return pytree.tree_map(lambda t: t[0] if isinstance(t, Tensor) else t, batch)
