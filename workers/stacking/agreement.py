"""Decisions that a forward takes on its data, inside ``vmap``.

``if mask.all():`` asks a stack of replicas for one truth value, and ``vmap`` refuses to give one. Where all replicas
answer alike the answer is sound for each of them (transformers asks in this way whether a batch has any padding);
where they do not, the refusal stands and the replicas are trained one at a time.

Covers truth values alone, not ``.item()`` or shapes that depend on data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.overrides import TorchFunctionMode


class ReplicasAgree(TorchFunctionMode):
    """Inside this mode the truth value of a stacked tensor is the one that all its entries share."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.__bool__ and _functorch.is_batchedtensor(args[0]):
            values = _values(args[0])
            if bool(values.all()) or not bool(values.any()):
                return bool(values.all())
        return func(*args, **(kwargs or {}))


def _values(tensor: Tensor) -> Tensor:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor
