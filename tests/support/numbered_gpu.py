"""A GPU that is not there, with numbers: tensors that say they are elsewhere, and hold one of the CPU's.

torch refuses to mix the CPU's tensors with a GPU's, but for numbers and indices; so does this. Whole programs run on
it, decisions on numbers included, and give the CPU's bits. It goes by the name of the meta device, whose backward runs
where it is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from tests.support import pretend_gpu

DEVICE = torch.device("meta")
READS = ("aten::_local_scalar_dense", "aten::equal")
INDEXED = ("aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
"""Kernels that take their indices from the CPU."""
aten = torch.ops.aten


class MixedError(RuntimeError):
    """Tensors of two devices meet."""


class _There(Tensor):
    @staticmethod
    def __new__(cls, held: Tensor) -> _There:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held: Tensor) -> None:
        self._held = held

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["_held"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, _meta: Any, _size: Any, _stride: Any) -> _There:
        return _There(inner["_held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def _here(value: Any) -> Any:
    return tree_map(lambda t: t._held if isinstance(t, _There) else t, value)


def _there(value: Any) -> Any:
    return tree_map(lambda t: _There(t) if isinstance(t, Tensor) and not isinstance(t, _There) else t, value)


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    comes = any(isinstance(t, _There) for t in tensors)
    own = _here(kwargs)
    asked = own.get("device")
    goes = comes if asked is None else torch.device(asked).type == DEVICE.type
    if goes and asked is not None:
        own["device"] = torch.device("cpu")
    if name == "aten::_efficientzerotensor":
        func = aten.zeros.default  # One without memory is known as such by its kind.
    if name in READS:
        return func(*_here(args), **own)
    if name == "aten::copy_":
        func(*_here(args), **own)
        return args[0]
    if name != "aten::_to_copy" and comes:
        meet = args[2:] if name in INDEXED and isinstance(args[0], _There) else tensors
        if any(not isinstance(t, _There) and t.dim() > 0 for t in tree_leaves(meet) if isinstance(t, Tensor)):
            raise MixedError(f"{func} takes tensors of two devices")
    out = func(*_here(args), **own)
    if not goes:
        return out
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
    return return_and_correct_aliasing(func, args, kwargs, _there(out)) if writes else _there(out)


class NoWaits(pretend_gpu.NoWaits):
    """Refuses what the host would wait for: a number that it reads and a shape that depends on one too."""

    def __init__(self) -> None:
        super().__init__(DEVICE.type)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        comes = any(isinstance(t, _There) for t in tree_leaves((args, kwargs)))
        waits = not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.isdisjoint(func.tags)
        if func._schema.name in INDEXED:
            # torch marks every index, of which a mask alone is waited for.
            waits = any(isinstance(t, Tensor) and t.dtype is torch.bool for t in tree_leaves(args[1]))
        if comes and waits:
            raise pretend_gpu.Waits(str(func))
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Kernels(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class _Made(TorchFunctionMode):
    """What torch makes of Python's lists it makes without asking a mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            if isinstance(args[0], _There):
                return args[0].to(kwargs.get("dtype") or args[0].dtype)
            del kwargs["device"]
            return func(*args, **kwargs).to(DEVICE)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = tuple(map(_index, args[1])) if isinstance(args[1], tuple) else _index(args[1])
            return func(args[0], index, *args[2:])
        if func is Tensor.tolist and isinstance(args[0], _There):
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


def _index(value: Any) -> Any:
    return torch.tensor(value, dtype=None if value else torch.long) if isinstance(value, list) else value


@contextmanager
def gpu() -> Iterator[torch.device]:
    """The body's tensors on the device have numbers."""
    with _Kernels(), _Made():
        yield DEVICE
