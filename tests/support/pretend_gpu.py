"""A GPU that is not there: tensors with a device and shapes, and without numbers.

torch refuses to mix them with the CPU's and to read a value of them, as a step inside a CUDA graph must not. What torch
would allow and a host would wait for (an index from the CPU, a copy that is not asynchronous) is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"


def device() -> torch.device:
    """The device; made known to torch once a process."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME)
    return torch.device(NAME, 0)


class Waits(RuntimeError):
    """The host would wait for the device."""


class NoWaits(TorchDispatchMode):
    """Refuses what the host would wait for; ``name``: of the device."""

    def __init__(self, name: str = NAME) -> None:
        super().__init__()
        self._name = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, tensors = func._schema.name, [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        there = any(t.device.type == self._name for t in tensors)
        if name in ("aten::_to_copy", "aten::copy_"):
            own = args[0].device.type
            other = args[1].device.type if name == "aten::copy_" else torch.device(kwargs.get("device") or own).type
            if {own, other} == {"cpu", self._name} and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                raise Waits(f"{func} between {own} and {other}")
        elif there and any(t.device.type == "cpu" and t.dim() > 0 for t in tensors):
            raise Waits(f"{func} takes a tensor from the CPU")
        return func(*args, **kwargs)


@contextmanager
def gpu() -> Iterator[torch.device]:
    """The body's tensors on the device have no numbers."""
    there = device()
    with FakeTensorMode(allow_non_fake_inputs=False):
        yield there
