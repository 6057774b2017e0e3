"""Dropout masks that are the same whether a model runs alone or in a stack of replicas.

torch draws a mask in the memory order of the tensor that it masks. Under ``vmap`` that order may be another one (after
a transpose, with ``batch_first`` attention, in channels_last), and on CUDA another kernel draws. So the model is run
alone once, its orders are recorded, and a stack draws in them.

Covers ``torch.nn.functional.dropout``, which ``nn.Dropout`` calls. If a stack draws other masks in another way, the
sweep's proof of its engine sees it and the stack is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Order = tuple[int, ...]
"""The dimensions of a tensor from the outermost to the innermost in memory."""


class Draws(TorchFunctionMode):
    """Inside this mode a model that runs alone draws as ``torch`` does on a CPU, and its orders are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.orders: list[Order] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.dropout:
            x, p, training, _ = _arguments(*args, **kwargs)
            if training and 0 < p < 1:
                self.orders.append(order_of(torch.empty_like(x)))
                if x.device.type == "cuda":
                    # Avoid the fused kernel: it draws another sequence than the plain one, which replicas can share.
                    return masked(x, p, self.orders[-1])
        return func(*args, **kwargs)


def masked(x: Tensor, p: float, order: Order) -> Tensor:
    """Dropout of ``x`` with a mask drawn in ``order``; ``x`` may be a stack under ``vmap``, whose replicas share it."""
    noise = torch.empty([x.shape[i] for i in order], dtype=x.dtype, device=x.device).bernoulli_(1 - p).div_(1 - p)
    return x * noise.permute([order.index(i) for i in range(len(order))])


def _arguments(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> tuple[Tensor, float, bool, bool]:
    return input, p, training, inplace


def order_of(tensor: Tensor) -> Order:
    """The order in which a tensor lies in memory."""
    # Of equal strides (dimensions of size 1) the first is the outermost.
    strides = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda i: -strides[i]))
