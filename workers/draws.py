"""Dropout masks that are the same however a model is run: alone, in a stack of replicas, or on a part of a batch.

torch draws a mask in the memory order of the tensor that it masks. Under ``vmap`` that order may be another one (after
a transpose, with ``batch_first`` attention, in channels_last), and on CUDA another kernel draws. So the model is run
alone once, its draws are recorded, and a stack draws in their order.

Covers ``torch.nn.functional.dropout``, which ``nn.Dropout`` calls, and the dropout of
``scaled_dot_product_attention``. If a stack draws other masks in another way, the sweep's proof of its engine sees it
and the stack is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fimo.workers.attention import attention, multi_head, weights_shape

Order = tuple[int, ...]
"""The dimensions of a tensor from the outermost to the innermost in memory."""


@dataclass(frozen=True)
class Draw:
    """One call of dropout that draws.

    Attributes:
        order: the memory order of what is masked; ``shape``: its shape.
        p: the probability of a zero.
    """

    order: Order
    shape: tuple[int, ...]
    p: float


class Draws(TorchFunctionMode):
    """Inside this mode a model that runs alone draws as ``torch`` does on a CPU, and its draws are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Draw] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.multi_head_attention_forward:
            return multi_head(self, args, kwargs)
        if func is torch.nn.functional.dropout:
            x, p, training, inplace = dropout_arguments(*args, **kwargs)
            if training and 0 < p < 1:
                self.draws.append(Draw(order_of(torch.empty_like(x)), tuple(x.shape), p))
                if x.device.type == "cuda":
                    # Avoid the fused kernel: it draws another sequence than the plain one, which replicas can share.
                    out = masked(x, p, self.draws[-1].order)
                    return x.copy_(out) if inplace else out
        if func is torch.nn.functional.scaled_dot_product_attention and dropout_of(args, kwargs) > 0:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(self, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shape, p = weights_shape(query, key), dropout_of((query, key, *args), kwargs)
        draw = Draw(tuple(range(len(shape))), shape, p)
        self.draws.append(draw)
        if query.device.type == "cuda":
            return attention(lambda w, p: masked(w, p, draw.order), query, key, *args, **kwargs)
        out: Tensor = torch.nn.functional.scaled_dot_product_attention(query, key, *args, **kwargs)
        return out


def masked(x: Tensor, p: float, order: Order) -> Tensor:
    """Dropout of ``x`` with a mask drawn in ``order``; ``x`` may be a stack under ``vmap``, whose replicas share it."""
    noise = drawn([x.shape[i] for i in order], p, x.dtype, x.device).div_(1 - p)
    return x * noise.permute([order.index(i) for i in range(len(order))])


def drawn(shape: Sequence[int], p: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Ones with probability 1 − p, else zeros; the same ones in every precision."""
    # On CUDA float64 draws another sequence, and a run in it would differ by its masks.
    return torch.empty(list(shape), dtype=torch.float32, device=device).bernoulli_(1 - p).to(dtype)


def dropout_arguments(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> tuple[Tensor, float, bool, bool]:
    """The arguments of ``torch.nn.functional.dropout``, in order."""
    return input, p, training, inplace


def dropout_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """The ``dropout_p`` of a call of ``scaled_dot_product_attention``."""
    return float(args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0))


def order_of(tensor: Tensor) -> Order:
    """The order in which a tensor lies in memory."""
    # Of equal strides (dimensions of size 1) the first is the outermost.
    strides = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda i: -strides[i]))
