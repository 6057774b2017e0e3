"""Random access to a workload's examples, whatever they are kept in.

A *batch* is what the workload's ``outputs`` and ``loss`` receive: any pytree of tensors whose first
dimension runs over examples, most often a dict. This module only fetches: it knows nothing of models.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fimo.workers.errors import WorkloadError

Batch = Any
"""A pytree of tensors; Mappings that torch does not know (``BatchEncoding``) are turned into dicts."""


class Dataset(Protocol):
    """A map-style dataset: ``len`` and integer indexing."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def as_batch(value: Any) -> Batch:
    """``value`` with every Mapping a plain dict, so that torch's pytree functions see its tensors."""
    if isinstance(value, Mapping):
        return {str(k): as_batch(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(as_batch(v) for v in value)
    return value


def to(batch: Batch, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
    """``batch`` moved to ``device``, its floating-point tensors cast to ``dtype``; integers keep theirs."""

    def move(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return t.to(device=device, dtype=dtype if t.is_floating_point() else None)

    return pytree.tree_map(move, batch)


def shapes(batch: Batch) -> tuple[Any, ...]:
    """The shapes of a batch's leaves: batches with equal shapes can be stacked."""
    return tuple(tuple(t.shape) if isinstance(t, Tensor) else t for t in pytree.tree_leaves(batch))


def stack(batches: Sequence[Batch]) -> Batch:
    """Batches of equal shapes stacked along a new first dimension (tensors only)."""
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *batches)


def leaves_of(batch: Batch) -> list[tuple[str, Any]]:
    """(its path as a user would write it, value) of every leaf: ``'x'``, ``'inputs'['ids']``, ``[0]``.

    A list of strings or numbers is one leaf, since that is what somebody forgot to turn into a tensor.
    """
    found: list[tuple[str, Any]] = []

    def walk(value: Any, path: str) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(inner, f"{path}[{key!r}]" if path else repr(key))
        elif isinstance(value, list | tuple) and any(isinstance(v, Tensor | Mapping | list | tuple) for v in value):
            for place, inner in enumerate(value):
                walk(inner, f"{path}[{place}]")
        else:
            found.append((path, value))

    walk(batch, "")
    return found


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, list | tuple) and value:
        kinds = sorted({type(v).__name__ for v in value})
        return f"a {type(value).__name__} of {' and '.join(kinds)}"
    return "None" if value is None else f"a {type(value).__name__}"


def _at(value: Any, index: Tensor) -> Any:
    # Treat dicts apart: the Python of torch's pytrees costs as much as a small model's step.
    return value[index] if isinstance(value, Tensor) else pytree.tree_map(lambda t: t[index], value)


def _common_length(tensors: Batch) -> int:
    """How many examples a mapping of tensors holds; refuses (WorkloadError) what is none, by its key."""
    lengths: dict[str, int] = {}
    for key, leaf in leaves_of(tensors):
        if not isinstance(leaf, Tensor):
            raise WorkloadError(
                f"the examples' {key} is {kind_of(leaf)}, not a tensor: make one of it (torch.as_tensor, a tokenizer's "
                "return_tensors='pt'), or leave it out if the model does not read it"
            )
        if leaf.dim() == 0:
            raise WorkloadError(f"the examples' {key} is one number: its first dimension must run over examples")
        lengths[key] = len(leaf)
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{key}: {length}" for key, length in lengths.items())
        raise WorkloadError(f"examples given as tensors must be equally long, got lengths {told}")
    return next(iter(lengths.values()), 0)


class Examples:
    """Examples that can be fetched by index.

    Args:
        source: a mapping of equally long tensors, or a map-style dataset.
        collate: for a dataset, turns a list of its items into a batch; default: the dataset's own
            ``collate`` attribute, else stacking of mappings of tensors by torch's ``default_collate``.
        device, dtype: where batches go, and what floating-point tensors become.

    Raises:
        WorkloadError: the tensors are not equally long, there is no example, or the source is neither kind.
    """

    def __init__(
        self,
        source: Mapping[str, Tensor] | Dataset,
        collate: Callable[[list[Any]], Any] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self._tensors: Batch | None = None
        self._offset = 0
        if isinstance(source, Mapping):
            tensors = as_batch(source)
            self._length = _common_length(tensors)
            self._tensors = to(tensors, self.device, dtype)
        elif hasattr(source, "__getitem__") and hasattr(source, "__len__"):
            self._source: Dataset = source
            self._length = len(source)
            own = getattr(source, "collate", None)
            self._collate: Callable[[list[Any]], Any] = collate or own or torch.utils.data.default_collate
        else:
            raise WorkloadError(
                f"examples must be a mapping of tensors or a map-style dataset, not {type(source).__name__}"
            )
        if self._length == 0:
            raise WorkloadError("the training or the evaluation data hold no example")

    def __len__(self) -> int:
        return self._length

    @property
    def tensors(self) -> Batch | None:
        """All examples as one batch on the device if they are kept as tensors, else None."""
        return self._tensors

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """The examples at ``indices`` (k,), in that order, as one batch on the device.

        With tensors as the source, ``indices`` may have any shape; it becomes the leading shape.
        """
        if self._tensors is not None:
            # The host goes on: a blocking copy would wait for all that the device has yet to do.
            index = torch.as_tensor(indices, dtype=torch.long).to(self.device, non_blocking=self.device.type != "cpu")
            return {name: _at(value, index) for name, value in self._tensors.items()}
        items = [self._source[self._offset + int(i)] for i in indices]
        return to(as_batch(self._collate(items)), self.device, self.dtype)

    def first(self, count: int) -> Examples:
        """The first ``count`` examples, as examples of their own."""
        return self.span(0, count)

    def span(self, start: int, count: int) -> Examples:
        """At most ``count`` consecutive examples from ``start`` on, as examples of their own."""
        stop = min(start + count, len(self))
        if (start, stop) == (0, len(self)):
            return self
        cut = copy.copy(self)
        cut._length = stop - start
        if self._tensors is not None:
            cut._tensors = pytree.tree_map(lambda t: t[start:stop], self._tensors)
        else:
            cut._offset = self._offset + start
        return cut

    def batches(self, size: int, indices: Sequence[int] | None = None) -> Iterator[tuple[list[int], Batch]]:
        """Consecutive blocks of at most ``size`` examples, in order, the last one ragged."""
        chosen = list(range(len(self))) if indices is None else list(indices)
        for start in range(0, len(chosen), size):
            block = chosen[start : start + size]
            yield block, self.batch(block)
