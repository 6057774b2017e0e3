"""A stack whose replicas are computed each by itself, side by side on a GPU's streams, and not by ``vmap``.

``vmap`` makes of convolutions with weights of their own a grouped one, which is slow (pytorch#73764). By itself each
replica has the kernels of the model alone, but these leave most of a GPU idle. So replicas take turns on several
streams: a recorded step (``fimo.workers.stacking.captured``) is a graph whose branches run at once.

Invariants: a replica's numbers are those of a stack of one. Replicas run at once in a recorded step alone, and it is
not recorded if one of them reads what another has made, or writes what is not its own: nothing would say which comes
first. Elsewhere they run one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fimo.workers.examples import Batch
from fimo.workers.functional import FunctionalModel, PerExample, Tensors
from fimo.workers.randomness import undrawn
from fimo.workers.stacking import replicas
from fimo.workers.stacking.replicas import Gradients
from fimo.workers.stacking.stacked import CannotStackError

STREAMS = 8
"""On which replicas take turns: as many queues as a GPU serves at once unless its host is told otherwise."""

Result = TypeVar("Result")


def gradients(
    model: FunctionalModel,
    params: Tensors,
    buffers: Tensors,
    batch: Batch,
    weights: Tensor,
    shared: bool,
    *more: Any,
    **named: Any,
) -> tuple[Gradients, Tensors]:
    """What ``replicas.gradients`` gives, of a forward that draws nothing; ``more`` and ``named``: the rest it takes.

    Raises:
        CannotStackError: the losses of some replicas alone depend on a parameter.
        RuntimeError: several replicas' forwards draw.
    """

    def alone(lane: int) -> tuple[Gradients, Tensors]:
        some = batch if shared else _row(batch, lane)
        own = weights if weights.dim() == 1 else _row(weights, lane)
        return replicas.gradients(model, _row(params, lane), _row(buffers, lane), some, own, shared, *more, **named)

    count = _count(params)
    # Each would draw other numbers than the first.
    with undrawn(model.device) if count > 1 else nullcontext():
        grads, after = zip(*side_by_side(alone, count, model.device), strict=True)
    return _stacked(grads), {name: torch.cat([one[name] for one in after]) for name in buffers}


def measures(
    model: FunctionalModel, params: Tensors, buffers: Tensors, batch: Batch, of: PerExample | None = None
) -> Tensor:
    """What ``replicas.measures`` gives."""

    def alone(lane: int) -> Tensor:
        return replicas.measures(model, _row(params, lane), _row(buffers, lane), batch, of)

    return torch.cat(side_by_side(alone, _count(params), model.device))


def side_by_side(of: Callable[[int], Result], count: int, device: torch.device) -> list[Result]:
    """Results of lanes 0 to ``count`` − 1, on a GPU by streams, whose work is done before what is asked for next.

    Streams begin when all that was asked for before is done. So memory that one of them has made can be read and freed
    outside, and none of them takes it before it is done with there.
    """
    if device.type != "cuda":
        return [of(lane) for lane in range(count)]
    main, streams = torch.cuda.current_stream(device), _streams(device)[:count]
    if not torch.cuda.is_current_stream_capturing():
        # On the streams too, so that what libraries keep for each of them is there before it is recorded.
        return _in_turn(of, count, main, streams)
    for stream in streams:
        stream.wait_stream(main)
    try:
        results, apart = list[Result](), Apart()
        for lane in range(count):
            with torch.cuda.stream(streams[lane % len(streams)]), apart.of(lane):
                results.append(of(lane))
        return results
    finally:
        # A recording that fails must end too, and it does not while a stream is away.
        for stream in streams:
            main.wait_stream(stream)


def _in_turn(of: Callable[[int], Result], count: int, main: Any, streams: Sequence[Any]) -> list[Result]:
    results, before = list[Result](), main
    try:
        for lane in range(count):
            stream = streams[lane % len(streams)]
            if stream is not before:
                stream.wait_stream(before)
            before = stream
            with torch.cuda.stream(stream):
                results.append(of(lane))
        return results
    finally:
        if before is not main:
            main.wait_stream(before)


@lru_cache(maxsize=16)
def _streams(device: torch.device) -> list[Any]:
    return [torch.cuda.Stream(device) for _ in range(STREAMS)]


class Apart(TorchDispatchMode):
    """Refuses lanes that depend on each other: what one has made the next may not read, and no one may write the rest.

    A forward may keep what it made at its first call, such as a table of positions.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._lane = 0
        # By storage: an address that is free again belongs to whoever makes something there.
        self._made: dict[int, int] = {}

    def of(self, lane: int) -> Apart:
        """The mode for what follows to be a lane's."""
        self._lane = lane
        return self

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = _storages((args, kwargs))
        if any(self._made.get(storage, self._lane) != self._lane for storage in given):
            raise RuntimeError(f"{func} reads what another replica has made")
        if any(storage not in self._made for storage in _storages(_written(func, args, kwargs or {}))):
            raise RuntimeError(f"{func} writes what is not the replica's own")
        out = func(*args, **(kwargs or {}))
        self._made.update((storage, self._lane) for storage in _storages(out) if storage not in given)
        return out


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that a kernel writes."""
    written = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[place] if place < len(args) else kwargs.get(argument.name))
    return written


def _storages(value: Any) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)}


def _row(tensors: Any, lane: int) -> Any:
    return pytree.tree_map(lambda t: t[lane : lane + 1] if isinstance(t, Tensor) else t, tensors)


def _count(params: Tensors) -> int:
    return len(next(iter(params.values())))


def _stacked(grads: Sequence[Gradients]) -> Gradients:
    """Gradients of stacks of one as one stack's; None where the losses of all do not depend on a parameter."""
    together: Gradients = {}
    for name in grads[0]:
        rows = [row for one in grads if (row := one[name]) is not None]
        if rows and len(rows) < len(grads):
            raise CannotStackError(f"only some replicas' losses depend on '{name}' at this step")
        together[name] = torch.cat(rows) if rows else None
    return together
