"""A traced graph whose elementwise kernels write over an operand that nothing reads any more.

A small model's step is bound by memory once its products are fast: a result in fresh memory costs a read of its
operand and a write elsewhere, one in the operand's place stays in the cache. The numbers are the same, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch

from fimo.workers.stacking.layouts import Layouts

aten = torch.ops.aten

IN_PLACE: dict[Any, Any] = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
    aten.add.Scalar: aten.add_.Scalar,
    aten.mul.Scalar: aten.mul_.Scalar,
    aten.relu.default: aten.relu_.default,
    aten.tanh.default: aten.tanh_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
}
COMMUTE = (aten.add.Tensor, aten.mul.Tensor)
BACKWARD = {
    aten.threshold_backward.default: aten.threshold_backward.grad_input,
    aten.tanh_backward.default: aten.tanh_backward.grad_input,
    aten.sigmoid_backward.default: aten.sigmoid_backward.grad_input,
}
PRODUCTS = (aten.bmm.default, aten.mm.default, aten.addmm.default, aten.baddbmm.default)
FRESH = {*IN_PLACE, *BACKWARD, *PRODUCTS}
"""Kernels whose result is memory of its own. Others may hand out their operand's, whatever their schema says."""


def reuse(module: torch.fx.GraphModule, layouts: Layouts) -> None:
    """Let the graph's elementwise kernels write in place where that changes nothing, not even how a result lies."""
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    own = {node for node in order if node.target in FRESH}
    for node in order:
        if node.target in IN_PLACE:
            _overwrite(node, own, order, layouts)
        elif node.target in BACKWARD:
            spent = node.args[0]
            if _is_spent(spent, node, own, order, layouts):
                node.target = BACKWARD[node.target]
                node.kwargs = {**node.kwargs, "grad_input": spent}
    module.graph.lint()
    module.recompile()


def _overwrite(
    node: torch.fx.Node,
    own: set[torch.fx.Node],
    order: dict[torch.fx.Node, int],
    layouts: Layouts,
) -> None:
    first, *rest = node.args
    if _is_spent(first, node, own, order, layouts):
        node.target = IN_PLACE[node.target]
    elif node.target in COMMUTE and not node.kwargs and _is_spent(rest[0], node, own, order, layouts):
        node.args = (rest[0], first)
        node.target = IN_PLACE[node.target]


def _is_spent(
    operand: Any,
    node: torch.fx.Node,
    own: set[torch.fx.Node],
    order: dict[torch.fx.Node, int],
    layouts: Layouts,
) -> bool:
    """Whether an operand's memory is the graph's own, lies as the result does, and is not read after ``node``.

    A view of it would read it too: whatever else uses it must come before and give memory of its own.
    """
    if operand not in own or layouts.get(operand) != layouts.get(node) or list(node.args).count(operand) != 1:
        return False
    return all(user is node or (user in own and order[user] < order[node]) for user in operand.users)
