"""A traced graph made cheaper; what it computes stays the same to rounding."""

from __future__ import annotations

from typing import Any

import torch

THIN = 32
"""Rows or columns below which BLAS is faster one way round than the other."""

aten = torch.ops.aten


def simplify(graph: torch.fx.Graph) -> None:
    """Drop what computes nothing, and give thin matrix products to faster kernels than BLAS's."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if (same := _the_same(node)) is not None:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
        elif node.target is aten.ones_like.default:
            _ones(graph, node)
        elif node.target is aten.bmm.default:
            _thin_product(graph, node)
        elif node.target is aten.transpose.int:
            _transposed_product(graph, node)
    for node in list(graph.nodes):
        if node.target is aten.transpose.int:
            _transposed_back(graph, node)
    graph.eliminate_dead_code()
    graph.lint()


def _the_same(node: torch.fx.Node) -> Any:
    """The operand that a node's value is equal to, bit for bit; None = there is none."""
    target, args = node.target, node.args
    if target is aten.detach.default:
        return args[0]
    if target in (aten.view.default, aten._unsafe_view.default, aten.expand.default):
        return args[0] if shape_of(node) == shape_of(args[0]) else None
    if target is aten.mul.Tensor:
        # A gradient of 1 a loss is where a backward begins.
        return next((a for a, b in (args, args[::-1]) if _are_ones(b) and _alike(node, a)), None)
    if target in (aten.mul.Scalar, aten.pow.Tensor_Scalar) and bool(args[1] == 1):
        return args[0] if dtype_of(node) == dtype_of(args[0]) else None
    return None


def _alike(node: torch.fx.Node, operand: Any) -> bool:
    if not isinstance(operand, torch.fx.Node):
        return False
    values = node.meta["val"], operand.meta["val"]
    return len({(value.shape, value.stride(), value.dtype) for value in values}) == 1


def _are_ones(value: Any) -> bool:
    while isinstance(value, torch.fx.Node) and value.target is aten.expand.default:
        value = value.args[0]
    return value.target is aten.ones.default if isinstance(value, torch.fx.Node) else bool(value == 1)


def _ones(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """Ones that need no tensor to be like: where a backward begins, this was the loss, which nobody asks for."""
    value = node.meta["val"]
    if value.is_contiguous():
        with graph.inserting_before(node):
            made = graph.call_function(
                aten.ones.default, (list(value.shape),), {"dtype": value.dtype, "device": value.device}
            )
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def _thin_product(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    left, right = node.args
    (_, rows, inner), (_, _, columns) = shape_of(left), shape_of(right)
    with graph.inserting_before(node):
        if inner == 1:
            product = graph.call_function(aten.mul.Tensor, (left, right))
        elif columns == 1 and rows > 1:
            # (A v)ᵀ = vᵀ Aᵀ: a row times a matrix is nine times as fast as a matrix times a column.
            flipped = [graph.call_function(aten.transpose.int, (side, 1, 2)) for side in (right, left)]
            row = graph.call_function(aten.bmm.default, tuple(flipped))
            product = graph.call_function(aten.transpose.int, (row, 1, 2))
        else:
            return
    product.meta = dict(node.meta)
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _transposed_product(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """(A B)ᵀ = Bᵀ Aᵀ: a gradient that lies as its parameter does is added to it twice as fast."""
    product, *axes = node.args
    if not isinstance(product, torch.fx.Node) or product.target is not aten.bmm.default or set(axes) != {1, 2}:
        return
    if min(shape_of(product)[1:]) < THIN or len(product.users) > 1:
        return
    with graph.inserting_before(node):
        left, right = (graph.call_function(aten.transpose.int, (side, 1, 2)) for side in product.args)
        flipped = graph.call_function(aten.bmm.default, (right, left))
    flipped.meta = dict(node.meta)
    node.replace_all_uses_with(flipped)
    graph.erase_node(node)


def _transposed_back(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """(Aᵀ)ᵀ = A, the very tensor."""
    once, *axes = node.args
    if isinstance(once, torch.fx.Node) and once.target is aten.transpose.int and set(axes) == set(once.args[1:]):
        node.replace_all_uses_with(once.args[0])  # type: ignore[arg-type]
        graph.erase_node(node)


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of a node's value."""
    return tuple(node.meta["val"].shape)


def dtype_of(node: Any) -> torch.dtype:
    """The dtype of a node's value."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype
