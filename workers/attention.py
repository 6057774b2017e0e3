"""``scaled_dot_product_attention`` written out, by operations that stack and can be differentiated twice.

The same numbers to rounding. torch's fused kernels have no batching rule on a CPU, where ``vmap`` would take replicas
one by one, and none for second derivatives; on CUDA they draw dropout as no other kernel does, and have no backward
under ``vmap``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Dropout = Callable[[Tensor, float], Tensor]


def attention(
    dropout: Dropout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(Q Kᵀ · scale + mask) V, with dropout on the weights.

    Args:
        dropout: of a tensor and a probability, called if ``dropout_p`` is above 0; the others are torch's own.
    """
    # As torch's own plain path does: the root of the scale on either side.
    root = math.sqrt(query.shape[-1] ** -0.5 if scale is None else scale)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = (query * root) @ (key * root).transpose(-2, -1)
    allowed: Tensor | None = None
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        allowed = attn_mask if allowed is None else allowed & attn_mask
    elif attn_mask is not None:
        # −∞ forbids in a mask of numbers what False does in one of truths.
        permitted = attn_mask != -torch.inf
        scores = scores + torch.where(permitted, attn_mask, 0.0)
        allowed = permitted if allowed is None else allowed & permitted
    if allowed is None:
        weights = scores.softmax(-1)
    else:
        # A query that may look nowhere has the value 0 and no gradient, not 0/0.
        anywhere = allowed.any(-1, keepdim=True)
        scores = torch.where(allowed | ~anywhere, scores, -torch.inf)
        weights = torch.where(anywhere, scores.softmax(-1), 0.0)
    if dropout_p > 0:
        weights = dropout(weights, dropout_p)
    return weights @ value


def weights_shape(query: Tensor, key: Tensor) -> tuple[int, ...]:
    """The shape of the weights, which dropout masks."""
    return (*query.shape[:-1], key.shape[-2])


def multi_head(mode: TorchFunctionMode, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``multi_head_attention_forward`` (``nn.MultiheadAttention``) whose own attention and dropout the mode sees.

    torch hands a mode this function whole, and what it calls no more.
    """
    with mode, _not_handed_over():
        return functional.multi_head_attention_forward(*args, **kwargs)


@contextmanager
def _not_handed_over() -> Iterator[None]:
    module: Any = functional
    right = module.has_torch_function
    module.has_torch_function = lambda *_: False
    try:
        yield
    finally:
        module.has_torch_function = right
