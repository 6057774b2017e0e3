"""A random projection of one entry ±1 a row: a count sketch, for gradients too long for a dense one.

S (P × d) has one entry in each row: the columns come in turn, each stretch of d parameters one place further than the
one before, so that no layer's width falls in step with d; the signs are random. Then E[SSᵀ] = I, an inner product of
projections is that of the rows in expectation, and its variance about 2/d of their squared lengths, as a dense S has
it; but a row costs P additions, not P·d. Sources: Charikar, Chen and Farach-Colton (2002); Clarkson and Woodruff
(2013).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fimo.estimators.operators.gradients import Layout
from fimo.estimators.operators.hashes import signs
from fimo.estimators.operators.parts import Gradients, tiles

STRETCH = 2**20
"""Parameters that are projected at once."""


class Sketch:
    """S as what it does; its numbers depend on the seed, the parameter's place and d alone."""

    def __init__(self, size: int, dimension: int, seed: int, like: Tensor) -> None:
        self.dimension, self._size, self._seed, self._like = dimension, size, seed, like
        self._signs: Tensor | None = None

    def signs(self) -> Tensor:
        """±1 of every parameter, int8 (P,)."""
        if self._signs is None:
            pieces = [signs(self._seed, s, min(s + STRETCH, self._size)) for s in range(0, self._size, STRETCH)]
            self._signs = torch.cat(pieces).to(self._like.device)
        return self._signs

    def columns(self, places: Tensor) -> Tensor:
        """The column of each parameter."""
        return (places + places // self.dimension) % self.dimension

    def project(self, rows: Tensor) -> Tensor:
        """Rows (k, P) times S: (k, d)."""
        total = rows.new_zeros(len(rows), self.dimension)
        for start in range(0, self._size, STRETCH):
            total += self._stretch(rows[:, start : start + STRETCH], start)
        return total

    def back(self, features: Tensor) -> Tensor:
        """Features (k, d) times Sᵀ: (k, P)."""
        places = torch.arange(self._size, device=features.device)
        return features[:, self.columns(places)] * self.signs().to(features)

    def features(self, some: Gradients) -> Tensor:
        """Gradients kept layer by layer times S: (k, d)."""
        total = self._like.new_zeros(len(some), self.dimension)
        places = torch.arange(self._size, device=self._like.device)
        slices = Layout({n: torch.Size(s) for n, s in some.shapes.items()}).slices
        for name, where in slices.items():
            for of, (rows,) in tiles(name, some, like=self._like):
                here = of(places[where])
                if not len(here):
                    continue
                if int(here[-1] - here[0]) + 1 == len(here):
                    total += self._stretch(rows, int(here[0]))
                else:
                    total.index_add_(1, self.columns(here), rows * self.signs()[here].to(rows))
        return total

    def _stretch(self, rows: Tensor, start: int) -> Tensor:
        """Consecutive parameters from ``start`` on, (k, m): (k, d)."""
        d = self.dimension
        count, width = rows.shape
        before = start % d
        turns = -(-(before + width) // d)
        # A column more in each turn moves the next one on by a place.
        moved = rows.new_zeros(count, -(-turns * (d + 1) // d) * d)
        of_turns = moved[:, : turns * (d + 1)].view(count, turns, d + 1)
        own, at, turn = self.signs()[start : start + width].to(rows), 0, 0
        if before:
            at, turn = min(width, d - before), 1
            of_turns[:, 0, before : before + at] = rows[:, :at] * own[:at]
        whole = (width - at) // d
        middle = slice(at, at + whole * d)
        shape = (count, whole, d)
        torch.mul(rows[:, middle].reshape(shape), own[middle].view(shape[1:]), out=of_turns[:, turn : turn + whole, :d])
        rest = width - middle.stop
        if rest:
            of_turns[:, turn + whole, :rest] = rows[:, middle.stop :] * own[middle.stop :]
        return moved.view(count, -1, d).sum(dim=1).roll((start // d) % d, dims=1)
