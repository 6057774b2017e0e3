"""How the tensors of a traced graph lie in memory, on which it depends what may be written over and what multiplies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides."""

Layouts = dict[torch.fx.Node, tuple[torch.device, torch.dtype, Layout]]
"""Where each node's tensor is, of what, and how it lies."""


def layout_of(tensor: Tensor) -> Layout:
    """A tensor's layout."""
    return tuple(tensor.shape), tensor.stride()


def layouts_of(module: torch.fx.GraphModule, given: Sequence[Tensor]) -> Layouts:
    """Of all tensors of a graph; ``given``: a call's. Runs it once."""
    noting = _Noting(module)
    with torch.no_grad():
        noting.run(*given)
    return noting.found


class _Noting(torch.fx.Interpreter):
    """Runs a graph and notes how each tensor lies."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.found: Layouts = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n] = (value.device, value.dtype, layout_of(value))
        return value
