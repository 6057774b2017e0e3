"""Large matrix products by oneDNN, on CPUs where it is faster than what torch multiplies by.

torch multiplies float32 matrices on a CPU by MKL, which gives a CPU of another maker than Intel its narrower vector
kernels: on one core of an EPYC with AVX-512, 105 GFLOP/s where oneDNN's reach 220. torch carries oneDNN too. Here a
model that trains alone has its products done by it as they come (``multiplied``), a traced stack for good
(``replaced``).

Invariants: which kernel multiplies follows from the CPU, the shapes and the strides, never from timing. A product is
the same to rounding either way, and sums over its inner dimension in one order, so that a run repeats bit for bit. The
definition (``fimo.workers.definition``) multiplies as torch does, so that a sweep's proof holds one against the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fimo.workers.device import cpu_vendor
from fimo.workers.functional import FunctionalModel
from fimo.workers.stacking.fused import fused, is_dense
from fimo.workers.stacking.layouts import Layout, Layouts, layout_of

aten = torch.ops.aten

WORTH = 2**19
"""Multiplications from which a product gains more by oneDNN than a call of it costs."""

LARGE = 2**16
"""Numbers in a matrix of weights from which it is worth to look at every kernel of a model that trains alone."""


@lru_cache(maxsize=1)
def gains() -> bool:
    """Whether MKL leaves half of this CPU's vectors idle, and oneDNN's product can be had and is one."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and cpu_vendor() not in ("", "GenuineIntel") and _is_product()


def _is_product() -> bool:
    left, right = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(3, 4)
    try:
        # torch makes this kernel for its own compiler, and may change it.
        return torch.equal(mm(left, right), torch.mm(left, right))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False


def multiplies(device: torch.device) -> str:
    """By whose kernels large float32 products are done on a device: "oneDNN", or "torch" for those that torch takes."""
    return "oneDNN" if device.type == "cpu" and gains() else "torch"


def mm(left: Tensor, right: Tensor) -> Tensor:
    """``torch.mm`` by oneDNN: float32 on a CPU."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
    return out


def addmm(bias: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``torch.addmm`` by oneDNN, with a bias (columns,)."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
    return out


def multiplied(model: FunctionalModel, wanted: bool = True) -> AbstractContextManager[object]:
    """Inside it, large products of two matrices are oneDNN's, if ``wanted``, the model has such and the CPU gains."""
    if not (wanted and _is_ours(model.device, model.dtype) and gains()):
        return nullcontext()
    tensors = (*model.params.values(), *model.fixed.values())
    return _ByOneDnn() if any(t.dim() == 2 and t.numel() >= LARGE for t in tensors) else nullcontext()


def replaced(module: torch.fx.GraphModule, layouts: Layouts) -> None:
    """Give a traced graph's large float32 products on a CPU to oneDNN, if that CPU gains by it.

    Args:
        module: changed in place; its values do not change but for rounding.
        layouts: of its tensors.
    """
    if not gains():
        return
    ours = {node: layout for node, (device, dtype, layout) in layouts.items() if _is_ours(device, dtype)}
    for node in module.graph.nodes:
        if node.target in (aten.bmm.default, *FORMS) and not node.kwargs and all(arg in ours for arg in node.args):
            node.target = _kernel(node.target, *(ours[arg] for arg in node.args)) or node.target
    module.graph.lint()
    module.recompile()


def _kernel(target: Any, *operands: Layout) -> Callable[..., Tensor] | None:
    """oneDNN's kernel for operands of these layouts; None = nothing to gain."""
    *bias, (left, _), (right, _) = operands
    if prod(left) * right[-1] < WORTH or not is_dense(operands[-1]):
        return None
    # oneDNN reads a bias as one without gaps: past its end, if it is one number for all columns.
    if any(layout != (right[-1:], (1,)) for layout in bias):
        return None
    return fused(operands[0], operands[1]) if target is aten.bmm.default else FORMS[target]


FORMS: Mapping[Any, Callable[..., Tensor]] = {aten.mm.default: mm, aten.addmm.default: addmm}


class _ByOneDnn(TorchDispatchMode):
    """Multiplies two large float32 matrices by oneDNN, in a forward and in its backward."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in FORMS and not kwargs and _are_plain(args):
            kernel = _kernel(func, *map(layout_of, args))
            if kernel is not None:
                return kernel(*args)
        return func(*args, **(kwargs or {}))


def _are_plain(operands: Sequence[Any]) -> bool:
    """float32 on a CPU, not sparse, and not a subclass of tensors with a way of its own."""
    return all(type(t) is Tensor and t.layout is torch.strided and _is_ours(t.device, t.dtype) for t in operands)


def _is_ours(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype is torch.float32
