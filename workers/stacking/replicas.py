"""Replicas of one model stacked along a first dimension and stepped together.

Runs a stack of one without ``vmap``: convolutions on a CPU are slower in stacks, and a model that ``vmap`` refuses
still trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from fimo.workers.batches import Block
from fimo.workers.draws import Draws, Order, order_of
from fimo.workers.errors import WorkloadError
from fimo.workers.examples import Batch, Examples, shapes, stack
from fimo.workers.functional import CHANGED_LATE, FunctionalModel, PerExample, Tensors
from fimo.workers.stacking.stacked import CannotStackError, Masks, Stacked
from fimo.workers.stacking.trimming import Trimming

Gradients = dict[str, Tensor | None]
"""Stacked gradients by the parameters' names; None if the loss does not depend on the parameter."""


def stacked(tensors: Tensors, count: int) -> Tensors:
    """``count`` copies of each tensor along a new first dimension."""
    # Make them contiguous even if the model's own lie in channels_last: vmapped convolutions are wrong on those.
    return {
        n: t.detach().expand(count, *t.shape).clone(memory_format=torch.contiguous_format) for n, t in tensors.items()
    }


def clip(grads: Gradients, max_norm: float) -> Gradients:
    """Each replica's own gradient clipped as ``torch.nn.utils.clip_grad_norm_`` clips one model's."""
    present = {n: g for n, g in grads.items() if g is not None}
    norms = torch.stack([g.reshape(len(g), -1).norm(dim=1) for g in present.values()]).norm(dim=0)
    scale = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    # Do not clip in place: autograd gives two parameters that are added up the same tensor.
    return {**grads, **{n: g * scale.view(-1, *[1] * (g.ndim - 1)) for n, g in present.items()}}


def fetch(
    train: Examples, block: Block, trimming: Trimming | None = None
) -> list[tuple[tuple[int, ...], Batch, Tensor, bool]]:
    """The block's batches: (lanes, batch, weights, shared); lanes whose batches differ in shape come apart."""
    if block.indices.ndim == 1 or train.tensors is not None:
        batch = train.batch(block.indices)
        if trimming is not None and block.length is not None:
            batch = trimming.cut(batch, block.length, block.indices.ndim)
        return [(block.lanes, batch, block.weights, block.indices.ndim == 1)]
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
    model: FunctionalModel,
    params: Tensors,
    buffers: Tensors,
    batch: Batch,
    weights: Tensor,
    shared: bool,
    masks: Masks | None = None,
    orders: Sequence[Order] = (),
    of: PerExample | None = None,
) -> tuple[Gradients, Tensors]:
    """Each replica's own ∇_θ Σ_j w_j ℓ_j(θ), stacked, and the buffers after its forward.

    Replicas share no parameter, so the gradient of the sum over replicas is each replica's own.

    Args:
        params, buffers: stacked (R, …); left as they are.
        batch: b examples that the replicas share, or stacked (R, b, …).
        weights: w, (b,) or (R, b).
        masks: of dropout; None = draw them.
        orders: the memory orders in which dropout draws; see ``stacked.Stacked``.
        of: what stands for ℓ; None = the model's loss.

    Returns:
        (gradients by name, None if the loss does not depend on the parameter; new buffers).
    """
    own = {n: p.detach().requires_grad_() for n, p in params.items()}
    with torch.enable_grad():
        copies = {n: b.clone() for n, b in buffers.items()}
        each, after = losses(model, own, copies, batch, shared, masks, orders, of)
        total = (each * weights.to(each, non_blocking=True)).sum()
    grads = torch.autograd.grad(total, list(own.values()), allow_unused=True)
    return dict(zip(own, grads, strict=True)), {n: t.detach() for n, t in after.items()}


def losses(
    model: FunctionalModel,
    params: Tensors,
    buffers: Tensors,
    batch: Batch,
    shared: bool,
    masks: Masks | None = None,
    orders: Sequence[Order] = (),
    of: PerExample | None = None,
) -> tuple[Tensor, Tensors]:
    """Per-example losses of stacked replicas, (R, b), and the buffers after the forward.

    Args:
        params, buffers: stacked (R, …); a forward may update ``buffers`` in place.
        batch: shared by the replicas, or stacked (R, b, …).
        of: what stands for the loss; None = the model's.

    Raises:
        WorkloadError: the forward replaced a buffer that was constant in the first forward.
    """
    value = model.loss if of is None else of

    def one(p: Tensors, b: Tensors, x: Batch) -> tuple[Tensor, Tensors]:
        fixed = {**model.fixed, **b}
        each = value(p, x, fixed)
        for name, tensor in model.fixed.items():
            if name not in b and fixed[name] is not tensor:
                raise WorkloadError(f"buffer '{name}' {CHANGED_LATE}")
        return each, {n: fixed[n] for n in b}

    count = next(iter(params.values())).shape[0]
    if count == 1:
        mode = Draws() if masks is None else Stacked(orders, masks)
        with mode:
            each, after = one(_alone(params, model.params), _first(buffers), batch if shared else _first(batch))
        if isinstance(mode, Stacked):
            mode.check_all_called()
        return each.unsqueeze(0), {n: t.unsqueeze(0) for n, t in after.items()}
    stacked_one = vmap(one, in_dims=(0, 0, None if shared else 0), randomness="same")
    together = Stacked(orders, masks)
    with together:
        out: tuple[Tensor, Tensors] = stacked_one(params, buffers, batch)
    together.check_all_called()
    return out


def measures(
    model: FunctionalModel, params: Tensors, buffers: Tensors, batch: Batch, of: PerExample | None = None
) -> Tensor:
    """g(z, θ_r) of stacked replicas on a shared evaluation batch, float64 (R, m); ``of`` stands for g."""
    value = model.measure if of is None else of

    def one(p: Tensors, b: Tensors) -> Tensor:
        return value(p, batch, {**model.fixed, **b})

    count = next(iter(params.values())).shape[0]
    if count == 1:
        return one(_alone(params, model.params), _first(buffers)).unsqueeze(0)
    with Stacked():
        out: Tensor = vmap(one, in_dims=(0, 0), randomness="same")(params, buffers)
    return out


def take(tensors: Tensors, lanes: tuple[int, ...], count: int) -> Tensors:
    """The given lanes of stacked tensors: the tensors themselves if that is all of them, in order."""
    if lanes == tuple(range(count)):
        return tensors
    return {n: t[places(lanes, t.device)] for n, t in tensors.items()}


@lru_cache(maxsize=1024)
def places(lanes: tuple[int, ...], device: torch.device) -> slice | Tensor:
    """An index of the lanes: a slice (so that indexing gives a view) if they are neighbours, else a tensor."""
    if lanes == tuple(range(lanes[0], lanes[-1] + 1)):
        return slice(lanes[0], lanes[-1] + 1)
    # Keep it on the device: a list would be sent there, and waited for, each time.
    return torch.tensor(lanes).to(device, non_blocking=True)


def put_back(into: Tensors, part: Tensors, lanes: tuple[int, ...]) -> None:
    """Write the given lanes of stacked tensors."""
    for name, tensor in part.items():
        into[name][places(lanes, tensor.device)] = tensor


class GradientSum:
    """The gradients of a stack of ``count`` replicas, added up from blocks of its lanes."""

    def __init__(self, count: int) -> None:
        self._count, self._everyone = count, tuple(range(count))
        self._sums: Gradients = {}
        # Lanes that have a gradient of a parameter; no entry = all of them.
        self._partial: dict[str, set[int]] = {}
        # Parameters whose sum is a tensor of this object's own.
        self._own: set[str] = set()

    def add(self, part: Mapping[str, Tensor | None], lanes: tuple[int, ...]) -> None:
        """Add gradients (len(lanes), …) of the given lanes; None adds nothing."""
        for name, grad in part.items():
            total = self._sums.get(name)
            if grad is None:
                self._sums[name] = total
            elif lanes == self._everyone and name not in self._partial:
                # Add in place only to a sum made here: autograd gives two parameters that are added up one tensor.
                if name in self._own and total is not None:
                    total += grad
                elif total is not None:
                    self._sums[name] = total + grad
                    self._own.add(name)
                else:
                    self._sums[name] = grad
            else:
                self._note(name, lanes, total is None)
                if total is None:
                    total = grad.new_zeros(self._count, *grad.shape[1:])
                elif name not in self._own:
                    total = total.clone()
                total[places(lanes, grad.device)] += grad
                self._sums[name] = total
                self._own.add(name)

    def _note(self, name: str, lanes: tuple[int, ...], first: bool) -> None:
        if first:
            self._partial[name] = set(lanes)
        elif name in self._partial:
            self._partial[name] |= set(lanes)

    def result(self, idle: Sequence[int] = ()) -> Gradients:
        """The sums by the parameters' names, None if the loss of no lane depends on the parameter.

        Args:
            idle: lanes whose loss is 0 at this step, of which 0 is the gradient.

        Raises:
            CannotStackError: the losses of some lanes depend on a parameter and those of others do not. torch's
                optimizers skip a parameter that has no gradient, which a stack cannot do for some of its lanes.
        """
        for name, lanes in self._partial.items():
            if len(lanes | set(idle)) < self._count:
                raise CannotStackError(f"only some replicas' losses depend on '{name}' at this step")
        return self._sums


def _alone(params: Tensors, like: Tensors) -> Tensors:
    """The one replica of a stack, its parameters laid out in memory as the model's own: in channels_last, dropout
    draws in another order."""
    first = {}
    for name, p in _first(params).items():
        axes = order_of(like[name])
        natural = axes == tuple(range(len(axes)))
        first[name] = p if natural else p.permute(axes).contiguous().permute([axes.index(i) for i in range(len(axes))])
    return first


def _first(batch: Batch) -> Batch:
    """The one of a stack of one, as a view whose gradient is a view too: that of ``t[0]`` is written into zeros."""
    return pytree.tree_map(lambda t: t.squeeze(0) if isinstance(t, Tensor) else t, batch)
