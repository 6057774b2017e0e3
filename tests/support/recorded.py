"""A CUDA graph without CUDA: kernels recorded on the CPU, and run again on the memory that they had.

As a graph does, it freezes what Python decided, reads its inputs where they lay, and refuses to bring a value to the
host while it records.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"}


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        if not _is_view(func):
            self.calls.append((func, args, kwargs or {}, out))
        return out


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def record(body: Callable[[], None]) -> Callable[[], None]:
    """A recorder as ``fimo.workers.stacking.captured`` takes one."""
    with _Recording() as recording:
        body()
    calls = recording.calls
    Counted.recorded += 1

    def launch() -> None:
        Counted.launched += 1
        for call in calls:
            again(*call)

    return launch


@torch.no_grad()
def again(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Run a recorded kernel, its result to where it lay."""
    new = func(*args, **kwargs)
    for old, fresh in zip(tree_leaves(out), tree_leaves(new), strict=True):
        if isinstance(old, Tensor) and old is not fresh:
            old.copy_(fresh)


class Counted:
    """How many bodies were recorded, and how often one was launched."""

    recorded = 0
    launched = 0
