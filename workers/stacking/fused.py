"""Batched matrix products by oneDNN, which torch gives float32 matrices to only where TorchScript has fused them.

So each product is a TorchScript function of its own, made for its operands' shapes and strides.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from fimo.workers.stacking.layouts import Layout

Product = Callable[[Tensor, Tensor], Tensor]

CALLS = 3
"""Calls after which TorchScript has noted the operands' layouts and put oneDNN's kernel in place."""

_making = threading.Lock()

log = logging.getLogger(__name__)


@lru_cache(maxsize=512)
def fused(left: Layout, right: Layout) -> Product | None:
    """``torch.bmm`` of float32 operands (R, m, k) and (R, k, n) of these layouts on a CPU; None = it cannot be had."""
    if not (is_dense(left) and is_dense(right)):
        return None
    try:
        # The fuser's switch is the process's: another thread that makes one would turn it off here, and on for good.
        with _making:
            return _fuse(_drawn(left, 0), _drawn(right, 1))
    except Exception as error:
        # TorchScript is on its way out of torch. Without it the products are torch's own.
        log.debug("no batched products by oneDNN: %s: %s", type(error).__name__, error)
        return None


def is_dense(layout: Layout) -> bool:
    """Whether a matrix, or several one after the other, lie without gaps, each by rows or by columns.

    oneDNN has no fast kernel for others, such as one matrix that all replicas share, or the first tokens of texts: it
    takes a thousand times as long, and refuses what overlaps. (Of two matrices it copies the left one.)
    """
    (*several, rows, columns), strides = layout
    apart = (rows * columns,) * len(several)
    return strides in ((*apart, columns, 1), (*apart, 1, rows))


def _fuse(left: Tensor, right: Tensor) -> Product | None:
    with _fusing(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(_product, (left, right), check_trace=False)
        for _ in range(CALLS):
            result = script(left, right)
        is_fused = "oneDNNFusionGroup" in str(torch._C._last_executed_optimized_graph())
    expected = torch.bmm(left, right)
    scale = float(expected.abs().max())
    if not is_fused or result.stride() != expected.stride() or not _near(result, expected, 1e-5 * scale):
        return None

    def product(left: Tensor, right: Tensor) -> Tensor:
        out: Tensor = script(left, right)
        return out

    return product


def _product(left: Tensor, right: Tensor) -> Tensor:
    # The fuser takes products of two dimensions and of four, and of three none.
    return torch.matmul(left.unsqueeze(0), right.unsqueeze(0)).squeeze(0)


def _near(a: Tensor, b: Tensor, most: float) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool((a - b).abs().max() <= most)


def _drawn(layout: Layout, seed: int) -> Tensor:
    return torch.empty_strided(*layout).normal_(generator=torch.Generator().manual_seed(seed))


@contextmanager
def _fusing() -> Iterator[None]:
    was = torch.jit.onednn_fusion_enabled()
    torch.jit.enable_onednn_fusion(True)
    try:
        yield
    finally:
        torch.jit.enable_onednn_fusion(was)
