"""A forward inside ``vmap`` over replicas: mends what torch gets wrong there, and decides what it refuses to.

* ``if mask.all():`` asks a stack for one truth value, and ``vmap`` refuses to give one. If all replicas answer alike,
  the answer is sound for each of them (transformers asks in this way whether a batch has any padding). If they do not,
  the refusal stands and the replicas are trained one at a time.
* Dropout draws its one mask in the memory order in which the model alone draws (``fimo.workers.draws``), or takes the
  one that it is given (``fimo.workers.stacking.masks``).
* Attention is written out where torch has no batching rule (``fimo.workers.attention``).
* ``nn.Embedding(padding_idx=…)`` of stacked weights masks the padding row's gradient in the first replica alone.
* Convolutions whose weights lie in channels_last have a wrong gradient for a batch of one.

Covers these and no more: a sweep's proof finds the rest (``fimo.workers.proof``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fimo.workers.attention import attention, multi_head
from fimo.workers.draws import Order, dropout_arguments, dropout_of, masked

CONVOLUTIONS = (
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
)
ATTENTION = (functional.multi_head_attention_forward, functional.scaled_dot_product_attention)


class CannotStackError(RuntimeError):
    """The replicas cannot be trained together. They are trained one at a time instead."""


Masks = Callable[[int, tuple[int, ...], float], Tensor]
"""(number of the call, shape, p) -> the mask of a call of dropout: zeros and ones."""


class Stacked(TorchFunctionMode):
    """Inside this mode a vmapped forward computes for every replica what the model alone computes.

    Args:
        orders: the memory orders in which the model's dropout layers draw, in the order of their calls.
        masks: None = draw them.
        decides: give a truth value that all replicas share; else leave it to ``vmap``, which refuses.
    """

    def __init__(self, orders: Sequence[Order] = (), masks: Masks | None = None, decides: bool = True) -> None:
        super().__init__()
        self._orders, self._masks, self._decides = tuple(orders), masks, decides
        self._natural = all(order == tuple(range(len(order))) for order in self._orders)
        self._calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__bool__:
            return _one_truth(args[0]) if self._decides and _functorch.is_batchedtensor(args[0]) else func(*args)
        if func is functional.dropout:
            x, p, training, inplace = dropout_arguments(*args, **kwargs)
            return self._dropout(x, p, inplace) if training and 0 < p < 1 else func(x, p, training, inplace)
        if func in ATTENTION:
            return self._attention(func, args, kwargs)
        if func is functional.embedding:
            return _embedding(*args, **kwargs)
        if func in CONVOLUTIONS and len(args) > 1:
            image, weight, *rest = args
            return func(image.contiguous(), weight.contiguous(), *rest, **kwargs)
        return func(*args, **kwargs)

    def check_all_called(self) -> None:
        """Refuse a forward that took fewer of its masks than were learnt: a part of a batch would draw otherwise."""
        if self._masks is not None and self._calls != len(self._orders):
            raise CannotStackError("dropout is called less often than in the first forward")

    def _attention(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if func is functional.multi_head_attention_forward:
            return multi_head(self, args, kwargs)
        return attention(self._dropout, *args, **kwargs) if self._writes_out(args, kwargs) else func(*args, **kwargs)

    def _writes_out(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        if dropout_of(args, kwargs) > 0:
            return True
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        # Inside vmap a tensor says that it needs no gradient. On a GPU torch then keeps nothing for the backward, which
        # fails ("LSE is not correctly aligned").
        unfused = torch.is_grad_enabled() or args[0].device.type == "cpu"
        return unfused and any(_functorch.is_batchedtensor(t) for t in tensors)

    def _dropout(self, x: Tensor, p: float, inplace: bool = False) -> Tensor:
        # The forward may go on with what it gave, rather than with what it got back.
        return x.copy_(self._dropped(x, p)) if inplace else self._dropped(x, p)

    def _dropped(self, x: Tensor, p: float) -> Tensor:
        place, self._calls = self._calls, self._calls + 1
        if self._masks is not None:
            return x * self._masks(place, tuple(x.shape), p).to(x.dtype).div_(1 - p)
        if self._natural and x.device.type == "cpu":
            # Leave it to vmap, which draws contiguously, as the model alone does here.
            return functional.dropout(x, p, True)
        if place >= len(self._orders) or len(self._orders[place]) != x.dim():
            raise CannotStackError("dropout is called otherwise than in the first forward")
        return masked(x, p, self._orders[place])


def _one_truth(tensor: Tensor) -> bool:
    values = tensor
    while _functorch.is_functorch_wrapped_tensor(values):
        values = _functorch.get_unwrapped(values)
    if bool(values.all()):
        return True
    if bool(values.any()):
        raise CannotStackError("vmap: replicas decide differently on their data")
    return False


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if padding_idx is None or max_norm is not None:
        return functional.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    rows = functional.embedding(input, weight, None, None, norm_type, scale_grad_by_freq, sparse)
    padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
    # Keep the padding row's value and drop its gradient, as torch does for one model.
    return torch.where(padding, rows.detach(), rows)
