"""Second moments summed over many examples: of some in the model's dtype, the sums of those in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fimo.estimators.operators.parts import TILE

TOGETHER = 1024
"""Positions whose outer products are summed by one matrix product, in the model's dtype."""


BLOCK = 256
"""Columns of a symmetric matrix that are computed together."""


class Moment:
    """Σ xxᵀ over positions, the sums of ``TOGETHER`` of them in float64, and how many there were."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.positions = 0
        self._waiting: list[Tensor] = []
        self._rows = 0

    def add(self, x: Tensor) -> None:
        """Rows (positions, side)."""
        self.positions += len(x)
        self._waiting.append(x)
        self._rows += len(x)
        if self._rows >= TOGETHER:
            self._sum()

    def mean(self, count: int) -> Tensor | None:
        """The sum divided by ``count``, float64 (side, side); None if nothing was added."""
        if self._waiting:
            self._sum()
        return None if self.total is None or not self.positions else self.total / count

    def _sum(self) -> None:
        rows = torch.cat(self._waiting)
        side = rows.shape[1]
        if self.total is None:
            self.total = torch.zeros(side, side, dtype=torch.float64, device=rows.device)
        # The matrix is symmetric: blocks above the diagonal are those below it.
        for start in range(0, side, BLOCK):
            here = slice(start, start + BLOCK)
            product = rows[:, here].T @ rows[:, start:]
            self.total[here, start:] += product
            below = product[:, BLOCK:]
            self.total[start + BLOCK :, here] += below.T
        self._waiting, self._rows = [], 0


FLUSHED = 32
"""Examples at least whose squares are summed in the model's dtype before they are in float64."""


class SquareSum:
    """Σ M² over matrices M, float64: of some examples' in their own dtype, the sums of those in float64."""

    def __init__(self, into: Tensor) -> None:
        self._into, self._some, self._count = into, torch.zeros(0), 0

    def add(self, g: Tensor, a: Tensor) -> None:
        """(Σ_t g_bt a_btᵀ)² of every example, g (B, T, out) and a (B, T, in)."""
        if g.shape[1] == 1:
            self.add_sum(g[:, 0].square().T @ a[:, 0].square(), len(g))
            return
        together = TILE // self._into.numel()
        if together > 4:
            for some_g, some_a in zip(g.split(together), a.split(together), strict=True):
                self.add_sum(torch.bmm(some_g.transpose(1, 2), some_a).square_().sum(dim=0), len(some_g))
            return
        # Large ones one by one, in the same memory.
        one = g.new_empty(g.shape[2], a.shape[2])
        for own_g, own_a in zip(g, a, strict=True):
            torch.mm(own_g.T, own_a, out=one)
            self._room(one).addcmul_(one, one)
            self._counted(1)

    def add_sum(self, squares: Tensor, count: int) -> None:
        """The squares of ``count`` examples, summed."""
        self._room(squares).add_(squares)
        self._counted(count)

    def _room(self, like: Tensor) -> Tensor:
        if not self._count:
            self._some = torch.zeros_like(like)
        return self._some

    def _counted(self, count: int) -> None:
        self._count += count
        if self._count >= FLUSHED:
            self.flush()

    def flush(self) -> None:
        """Have everything in float64."""
        if self._count:
            self._into += self._some
        self._count = 0
