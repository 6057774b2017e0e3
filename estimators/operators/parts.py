"""Per-example gradients kept as what they are made of, and inner products of them, parameter tensor by tensor.

A layer's gradient is Σ_t l_t r_tᵀ over the positions t that share its weight: T·(rows + columns) scalars instead of
rows·columns, which for a transformer on a sentence is a twentieth. An embedding's gradient has rows at the tokens that
occur alone. So the gradients of a hundred examples of a large model fit where a few rows of P scalars would, and each
example is differentiated once. Made dense they are a tile at a time, never all P scalars of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

TILE = 2**21
"""Scalars that are made dense at once: few enough for a processor's cache and for memory to be used again."""


class Part(Protocol):
    """What one or several calls of a module add to the gradient of one parameter, for B examples."""

    @property
    def scalars(self) -> int:
        """How many it keeps."""

    def tile(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the parameter, seen as (rows, columns), flattened: (B, (stop − start)·c)."""

    def first(self, count: int) -> Part:
        """Of the first ``count`` examples alone."""


@dataclass(frozen=True)
class Dense:
    """The gradient itself, (B, rows, columns)."""

    values: Tensor

    @property
    def scalars(self) -> int:
        """See ``Part``."""
        return self.values.numel()

    def tile(self, start: int, stop: int) -> Tensor:
        """See ``Part``."""
        return self.values[:, start:stop].flatten(1)

    def first(self, count: int) -> Dense:
        """See ``Part``."""
        return Dense(self.values[:count])


@dataclass(frozen=True)
class Outer:
    """Σ_t left_t right_tᵀ of left (B, T, rows) and right (B, T, columns)."""

    left: Tensor
    right: Tensor

    @property
    def scalars(self) -> int:
        """See ``Part``."""
        return self.left.numel() + self.right.numel()

    def tile(self, start: int, stop: int) -> Tensor:
        """See ``Part``."""
        return (self.left[:, :, start:stop].transpose(1, 2) @ self.right).flatten(1)

    def first(self, count: int) -> Outer:
        """See ``Part``."""
        return Outer(self.left[:count], self.right[:count])

    def kept(self) -> Outer | Dense:
        """Whichever of the two holds less."""
        count, _, rows = self.left.shape
        columns = self.right.shape[2]
        if self.scalars <= count * rows * columns:
            return self
        return Dense(self.left.transpose(1, 2) @ self.right)


@dataclass(frozen=True)
class Lookup:
    """Row ``ids[b, t]`` gets ``slopes[b, t]``: ids (B, T), slopes (B, T, columns)."""

    ids: Tensor
    slopes: Tensor

    @property
    def scalars(self) -> int:
        """See ``Part``."""
        return self.slopes.numel()

    def tile(self, start: int, stop: int) -> Tensor:
        """See ``Part``."""
        return self.at(torch.arange(start, stop, device=self.ids.device))

    def at(self, support: Tensor) -> Tensor:
        """The rows ``support`` (ascending), flattened: (B, len(support)·c)."""
        (count, places), width = self.ids.shape, len(support)
        columns = self.slopes.shape[2]
        if width == 0:
            return self.slopes.new_zeros(count, 0)
        at = torch.searchsorted(support, self.ids.contiguous()).clamp(max=width - 1)
        inside = support[at] == self.ids
        at = torch.where(inside, at, width)  # A spare row takes what lies outside.
        at = at + (width + 1) * torch.arange(count, device=at.device)[:, None]
        rows = self.slopes.new_zeros(count * (width + 1), columns)
        rows.index_add_(0, at.reshape(count * places), self.slopes.reshape(count * places, columns))
        return rows.reshape(count, width + 1, columns)[:, :width].flatten(1)

    def first(self, count: int) -> Lookup:
        """See ``Part``."""
        return Lookup(self.ids[:count], self.slopes[:count])


Parts = dict[str, list[Part]]
"""By parameter name; a name that is missing has a gradient of 0."""


@dataclass
class Gradients:
    """Gradients of examples, in chunks that were differentiated together.

    Attributes:
        shapes: (rows, columns) of each parameter tensor that there may be a gradient of.
        indices: of the examples, in the order of the chunks.
        chunks: (examples, their parts).
    """

    shapes: dict[str, tuple[int, int]]
    indices: list[int] = field(default_factory=list)
    chunks: list[tuple[int, Parts]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def scalars(self) -> int:
        """How many are kept."""
        return sum(part.scalars for _, parts in self.chunks for some in parts.values() for part in some)

    def add(self, indices: Sequence[int], parts: Parts) -> None:
        """One more chunk."""
        self.indices += list(indices)
        self.chunks.append((len(indices), parts))

    def ids(self, name: str) -> list[Tensor] | None:
        """The rows that can be other than 0, if nothing but lookups has a part in the parameter; else None."""
        found: list[Tensor] = []
        for _, parts in self.chunks:
            for part in parts.get(name, []):
                if not isinstance(part, Lookup):
                    return None
                found.append(part.ids.flatten())
        return found

    def dense(self, name: str, start: int, stop: int, support: Tensor | None, like: Tensor) -> Tensor:
        """Rows ``start`` to ``stop`` of the parameter (or of those at ``support``), flattened: (examples, width)."""
        columns = self.shapes[name][1]
        into, at = like.new_empty(len(self), stop - start, columns), 0
        for count, parts in self.chunks:
            some, here = parts.get(name, []), into[at : at + count]
            at += count
            if len(some) == 1 and isinstance(some[0], Outer):
                torch.bmm(some[0].left[:, :, start:stop].transpose(1, 2), some[0].right, out=here)
                continue
            here.zero_()
            for part in some:
                if support is None:
                    here += part.tile(start, stop).view_as(here)
                else:
                    assert isinstance(part, Lookup)
                    here += part.at(support[start:stop]).view_as(here)
        return into.flatten(1)


Of = Callable[[Tensor], Tensor]
"""A vector over a parameter's entries (flattened) -> its entries in a tile."""


def tiles(name: str, *sets: Gradients, like: Tensor) -> Iterator[tuple[Of, list[Tensor]]]:
    """A parameter's gradients of several sets in dense tiles of at most ``TILE`` scalars: (of, [(n, w)]).

    Args:
        like: any tensor of the model's dtype and device.
    """
    rows, columns = sets[0].shapes[name]
    count = max(1, sum(len(some) for some in sets))
    support = _support(name, sets)
    if support is not None:
        rows = len(support)
    together = max(1, TILE // (count * columns))
    for start in range(0, rows, together):
        stop = min(start + together, rows)
        dense = [some.dense(name, start, stop, support, like) for some in sets]
        yield _picker(start * columns, stop * columns, columns, None if support is None else support[start:stop]), dense


def _picker(start: int, stop: int, columns: int, support: Tensor | None) -> Of:
    if support is None:
        return lambda vector: vector[start:stop]
    return lambda vector: vector.reshape(-1, columns)[support].flatten()


def _support(name: str, sets: Sequence[Gradients]) -> Tensor | None:
    """The rows at which any of the sets can be other than 0, ascending; None = all."""
    found: list[Tensor] = []
    for some in sets:
        ids = some.ids(name)
        if ids is None:
            return None
        found += ids
    return torch.cat(found).unique() if found else torch.zeros(0, dtype=torch.long)
