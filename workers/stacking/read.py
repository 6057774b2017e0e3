"""What the kernels of a recorded step read: a graph has their addresses, and keeps nothing alive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXED = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default}
"""Kernels that wait if an index is a mask."""
LAYERS = "attention", "_sdp_", "rnn", "lstm", "gru"
"""In the names of kernels that say that they draw whether they have dropout or not."""


class Read(TorchDispatchMode):
    """Inside this mode the memory is held that kernels read and none of them has made.

    Copies from the CPU and random numbers are refused, and whatever would bring a value to the host: torch asks CUDA
    for pinned memory before it says that it would wait, which breaks the recording off.

    A model may replace what it keeps from call to call, as ``replicas.places`` forgets old lanes: the memory would be
    another's when a launch reads it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # By address: what is made inside is freed, and made again, but never where something from outside lives.
        self.held: dict[int, torch.UntypedStorage] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = _tensors((args, kwargs))
        if _draws(func):
            raise RuntimeError(f"{func} draws random numbers, which are not recorded")
        if _waits(func, args) and any(tensor.device.type != "cpu" for tensor in given):
            raise RuntimeError(f"{func} brings a value to the host, which is not recorded")
        for tensor in given:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._made:
                self.held.setdefault(storage._cdata, storage)
        out = func(*args, **(kwargs or {}))
        results = _tensors(out)
        if func in (aten._to_copy.default, aten.copy_.default) and len({t.device.type for t in given + results}) > 1:
            # The host's memory is gone, or another's, when a launch copies from it.
            raise RuntimeError("a copy between the CPU and the device is not recorded")
        self._made.update({t.untyped_storage()._cdata for t in results} - self.held.keys())
        return out


def _waits(func: Any, args: Sequence[Any]) -> bool:
    if func in INDEXED:
        return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1]))
    return not WAITS.isdisjoint(getattr(func, "tags", ()))


def _draws(func: Any) -> bool:
    says = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
    return says and not any(layer in str(func) for layer in LAYERS)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
