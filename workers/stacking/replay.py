"""A function of tensors as a flat graph of its kernels, replayed without the Python of models, vmap and autograd.

Invariants: a replay computes what the function computes, to rounding: it is traced twice, from calls with other data
and parameters, and held against both. Whether a call is replayed follows from the calls before it in the same pass,
never from timing.

A graph freezes whatever Python reads of a tensor. So a function is not traced if it reads values (``.item()``,
``.tolist()``, ``.numpy()``, a decision), draws random numbers, writes to tensors, or has shapes that depend on data.

``further_train`` passes its gradients and measures through here, as ``fimo.workers.stacking.replicas`` defines them;
without this module the numbers are the same and a small model's step costs two to three times as much.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fimo.workers.device import clock
from fimo.workers.randomness import kept, undrawn
from fimo.workers.stacking.layouts import layouts_of
from fimo.workers.stacking.products import replaced
from fimo.workers.stacking.reuse import reuse
from fimo.workers.stacking.simplify import dtype_of, simplify

AFTER = 4
"""Calls of one signature before it is traced: a rare one is not worth a graph."""

Graph = Callable[..., Any]


class Graphs(dict[object, "Graph | None"]):
    """Traced graphs by name and signature, None = cannot be traced; kept from pass to pass.

    Attributes:
        seconds: of the device's ``clock``, spent on tracing so far.
    """

    seconds: float = 0.0


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
        self.calls: Counter[object] = Counter()
        self._before: dict[object, list[Any]] = {}

    def __call__(self, *args: Any, unless_replayed: Callable[[], None] = lambda: None) -> Any:
        """``function(*args)``, to be called under ``torch.no_grad``.

        Args:
            unless_replayed: called first where the function is, or is traced. A seed is for these: a graph draws
                nothing. A function that draws while it is traced is not replayed.
        """
        if self.graphs is None:
            unless_replayed()
            return self.function(*args)
        leaves, structure = _flatten(args)
        key = (self.name, structure, *map(_signature, leaves))
        self.calls[key] += 1
        graph = self.graphs.get(key)
        if graph is not None and self.calls[key] > AFTER:
            return graph(leaves)
        unless_replayed()
        if self.calls[key] <= AFTER:
            if key not in self.graphs:
                # Keep the first call's: blocks of an evaluation take turns, so two calls in a row may be of one block.
                self._before.setdefault(key, leaves)
            return self.function(*args)
        if key not in self.graphs:
            read = clock(_device(leaves))
            began = read()
            self.graphs[key] = _trace_or_none(self.function, leaves, self._before.pop(key, leaves), structure)
            self.graphs.seconds += read() - began
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
    # Count strides in: a kernel may depend on them, and a graph freezes the views that they allow.
    return (leaf.dtype, leaf.shape, leaf.stride()) if isinstance(leaf, Tensor) else leaf


class _Untraceable(Exception):
    """The graph would not be the function."""


def _device(leaves: list[Any]) -> torch.device:
    return next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), torch.device("cpu"))


def _trace_or_none(
    function: Callable[..., Any], leaves: list[Any], before: list[Any], structure: Structure
) -> Graph | None:
    device = _device(leaves)
    try:
        # What draws now and then would be frozen as it went here. The call that follows draws as if nothing had been.
        with kept(device), undrawn(device):
            return _trace(function, leaves, before, structure)
    except Exception as error:
        # Call the function itself, whatever the tracer objects to: that always works.
        log.debug("not replayed: %s: %s", type(error).__name__, error)
        return None


def _trace(function: Callable[..., Any], leaves: list[Any], before: list[Any], structure: Structure) -> Graph:
    """The graph of a call, simplified.

    Args:
        leaves: of the call that is traced.
        before: of an earlier call of the same signature, most often with another batch.

    Raises:
        _Untraceable: it reads values, draws random numbers, writes to tensors, or is not the function for both calls.
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

    given, other = [leaves[i] for i in places], [_elsewhere(before[i], i) for i in places]
    with _one_fake_mode(), _NoReads():
        module, second = make_fx(flat)(*given), make_fx(flat)(*other)
    _refuse_impure(module.graph)
    _refuse_other(module, second)
    simplify(module.graph)
    module.recompile()
    layouts = layouts_of(module, given)
    reuse(module, layouts)
    replaced(module, layouts)
    alone = out_structures[0][:1] == ("alone",)
    out_structure = out_structures[0][alone:]

    def replay(leaves: list[Any]) -> Any:
        out = _unflatten(module.forward(*[leaves[i] for i in places]), out_structure)
        return out[0] if alone else tuple(out)

    wide = all(t.dtype is torch.float64 for t in given if t.is_floating_point())
    with torch.no_grad():
        for tensors in (given, other):
            _compare(module.forward(*tensors), flat(*tensors), 1e-9 if wide else 1e-4)
    return replay


def _one_fake_mode() -> AbstractContextManager[Any]:
    """One mode for what a trace notes of its values' shapes: the tracer makes one for each value otherwise.

    Each reads the whole stack of Python's calls when it is made, which took half the time of a trace.
    """
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode

    return tracing(TracingContext(FakeTensorMode()))


def _elsewhere(tensor: Tensor, number: int) -> Tensor:
    """A tensor of the same signature with other values, if it is one of real numbers; labels and tokens stay valid."""
    if not tensor.is_floating_point():
        return tensor
    noise = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    away = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return away.copy_(tensor * (1 + 0.02 * (noise - 0.5)).to(tensor))


_READS = {
    getattr(torch.Tensor, name)
    for name in (
        *("item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__", "__complex__"),
        *("__contains__", "__dlpack__", "data_ptr", "equal", "is_nonzero", "allclose", "untyped_storage"),
    )
} | {torch.equal, torch.allclose, torch.is_nonzero}


class _NoReads(TorchFunctionMode):
    """Refuses calls that bring a tensor's values to Python: the tracer does not see them there."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _READS:
            raise _Untraceable(f"{getattr(func, '__name__', func)} reads a tensor's values")
        return func(*args, **(kwargs or {}))


def _refuse_impure(graph: torch.fx.Graph) -> None:
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            tags = node.target.tags
            if torch.Tag.nondeterministic_seeded in tags:
                raise _Untraceable(f"{node.target} draws random numbers")
            if node.target is aten.index.Tensor:
                # torch marks it for the one kind of index by which its shape depends on data.
                if any(_is_mask(index) for index in node.args[1]):
                    raise _Untraceable("an index is a mask: its shape depends on data")
            elif torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags:
                raise _Untraceable(f"{node.target} has a shape or a value that depends on data")
            if node.target._schema.is_mutable:
                raise _Untraceable(f"{node.target} writes to a tensor")


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.fx.Node) and dtype_of(index) in (torch.bool, torch.uint8)


def _refuse_other(one: torch.fx.GraphModule, other: torch.fx.GraphModule) -> None:
    """Whether two traces of one function are the same: the same kernels on the same constants."""
    if len(one.graph.nodes) != len(other.graph.nodes):
        raise _Untraceable("two traces have other kernels")
    for a, b in zip(one.graph.nodes, other.graph.nodes, strict=True):
        if (a.op, str(a.target), str(a.args), str(a.kwargs)) != (b.op, str(b.target), str(b.args), str(b.kwargs)):
            raise _Untraceable(f"two traces differ: {a.format_node()} and {b.format_node()}")
        if a.op == "get_attr" and not _same_constant(getattr(one, str(a.target)), getattr(other, str(b.target))):
            raise _Untraceable(f"the constant {a.target} depends on data")


def _same_constant(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b))
    return bool(a is b or a == b)


def _compare(got: list[Any], expected: list[Any], tolerance: float) -> None:
    for a, b in zip(got, expected, strict=True):
        if not isinstance(b, Tensor):
            if a is not b and a != b:
                raise _Untraceable(f"a plain value differs: {a} for {b}")
            continue
        scale = float(b.abs().nan_to_num().max()) if b.numel() else 0.0
        if not torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True):
            raise _Untraceable("the graph does not reproduce the call")
