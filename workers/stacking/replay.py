"""A function of tensors as a flat graph of its kernels, replayed without the Python of models, vmap and autograd.

Invariants: a replay computes what the function computes, to rounding, because it is traced from it and checked
against it; and whether a call is replayed follows from the calls before it in the same pass, never from timing. What a
graph could get wrong is not traced: draws of random numbers, writes to tensors, decisions on data.

``further_train`` passes its gradients and measures through here, as ``fimo.workers.stacking.replicas`` defines them;
without this module the numbers are the same and a small model's step costs two to three times as much.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

AFTER = 4
"""Calls of one signature that are not replayed, so that a graph is not traced for what is rare."""

THIN = 32
"""Rows or columns below which BLAS minds which way round a product is."""

Graph = Callable[..., Any]
Graphs = dict[object, "Graph | None"]
"""Traced graphs by name and signature, None = cannot be traced; kept from pass to pass."""

log = logging.getLogger(__name__)
aten = torch.ops.aten


class Replayed:
    """``function``, its calls replayed from the ``AFTER``-th of each signature on.

    One object serves one pass; its counts start at zero, so that a pass does not depend on those before it.

    Args:
        function: pytrees of tensors (and plain values) to a pytree of tensors (and plain values).
        name: tells functions that share ``graphs`` apart.
        graphs: None = never replay.
    """

    def __init__(self, function: Callable[..., Any], name: str, graphs: Graphs | None) -> None:
        self.function, self.name, self.graphs = function, name, graphs
        self._calls: Counter[object] = Counter()

    def __call__(self, *args: Any) -> Any:
        """``function(*args)``, to be called under ``torch.no_grad``."""
        if self.graphs is None:
            return self.function(*args)
        leaves, structure = _flatten(args)
        key = (self.name, structure, *map(_signature, leaves))
        self._calls[key] += 1
        if self._calls[key] <= AFTER:
            return self.function(*args)
        if key not in self.graphs:
            self.graphs[key] = _trace_or_none(self.function, leaves, structure)
        graph = self.graphs[key]
        return self.function(*args) if graph is None else graph(leaves)


Structure = tuple[Any, ...]
"""How an argument list was flattened, part by part: a dict's names, LEAF, or torch's own TreeSpec."""

LEAF = 0


def _flatten(values: Sequence[Any]) -> tuple[list[Any], Structure]:
    """Leaves and structure. Dicts of tensors go by their names: torch's pytrees cost as much as a small step."""
    leaves: list[Any] = []
    structure: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            leaves.append(value)
            structure.append(LEAF)
        elif type(value) is dict and all(v is None or isinstance(v, Tensor) for v in value.values()):
            leaves.extend(value.values())
            structure.append(tuple(value))
        else:
            inner, spec = pytree.tree_flatten(value)
            leaves.extend(inner)
            structure.append(spec)
    return leaves, tuple(structure)


def _unflatten(leaves: Sequence[Any], structure: Structure) -> list[Any]:
    left, values = iter(leaves), []
    for part in structure:
        if part is LEAF:
            values.append(next(left))
        elif isinstance(part, tuple):
            values.append({name: next(left) for name in part})
        else:
            values.append(pytree.tree_unflatten([next(left) for _ in range(part.num_leaves)], part))
    return values


def _signature(leaf: Any) -> object:
    # A kernel may depend on the strides; a graph bakes in the views that they allow.
    return (leaf.dtype, leaf.shape, leaf.stride()) if isinstance(leaf, Tensor) else leaf


class _Untraceable(Exception):
    """The graph would not be the function."""


def _trace_or_none(function: Callable[..., Any], leaves: list[Any], structure: Structure) -> Graph | None:
    try:
        return _trace(function, leaves, structure)
    except Exception as error:
        # Whatever the tracer objects to, the function itself is the way that always works.
        log.debug("not replayed: %s: %s", type(error).__name__, error)
        return None


def _trace(function: Callable[..., Any], leaves: list[Any], structure: Structure) -> Graph:
    """The graph of one call, simplified.

    Raises:
        _Untraceable: it draws random numbers, writes to tensors, or does not reproduce the call.
        Exception: what the tracer raises, such as on decisions that depend on data.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    out_structures: list[Structure] = []

    def flat(*tensors: Tensor) -> list[Any]:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        out = function(*_unflatten(filled, structure))
        out_leaves, out_structure = _flatten(out if isinstance(out, tuple) else (out,))
        out_structures.append(out_structure if isinstance(out, tuple) else ("alone", *out_structure))
        return out_leaves

    given = [leaves[i] for i in places]
    module = make_fx(flat)(*given)
    _refuse_impure(module.graph)
    simplify(module.graph)
    module.recompile()
    alone = out_structures[0][:1] == ("alone",)
    out_structure = out_structures[0][alone:]

    def replay(leaves: list[Any]) -> Any:
        out = _unflatten(module.forward(*[leaves[i] for i in places]), out_structure)
        return out[0] if alone else tuple(out)

    wide = all(t.dtype is torch.float64 for t in given if t.is_floating_point())
    with torch.no_grad():
        _compare(module.forward(*given), flat(*given), 1e-9 if wide else 1e-3)
    return replay


def _refuse_impure(graph: torch.fx.Graph) -> None:
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            if torch.Tag.nondeterministic_seeded in node.target.tags:
                raise _Untraceable(f"{node.target} draws random numbers")
            if node.target._schema.is_mutable:
                raise _Untraceable(f"{node.target} writes to a tensor")


def _compare(got: list[Any], expected: list[Any], tolerance: float) -> None:
    for a, b in zip(got, expected, strict=True):
        if not isinstance(b, Tensor):
            if a is not b and a != b:
                raise _Untraceable(f"a plain value differs: {a} for {b}")
            continue
        scale = float(b.abs().nan_to_num().max()) if b.numel() else 0.0
        if not torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True):
            raise _Untraceable("the graph does not reproduce the call")


def simplify(graph: torch.fx.Graph) -> None:
    """Drop what computes nothing and give thin matrix products, which BLAS is slow at, to faster kernels."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.bmm.default:
            _thin_product(graph, node)
        elif node.target is aten.transpose.int:
            _transposed_product(graph, node)
    for node in list(graph.nodes):
        if node.target is aten.transpose.int:
            _transposed_back(graph, node)
    graph.eliminate_dead_code()
    graph.lint()


def _is_identity(node: torch.fx.Node) -> bool:
    target, args = node.target, node.args
    if target is aten.detach.default:
        return True
    if target in (aten.view.default, aten._unsafe_view.default, aten.expand.default):
        return _shape(node) == _shape(args[0])
    return target is aten.mul.Scalar and bool(args[1] == 1) and _dtype(node) == _dtype(args[0])


def _thin_product(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    left, right = node.args
    (_, rows, inner), (_, _, columns) = _shape(left), _shape(right)
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
    if min(_shape(product)[1:]) < THIN or len(product.users) > 1:
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


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _dtype(node: Any) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype
