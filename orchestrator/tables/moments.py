"""Running moments over seeds, elementwise, in float64: means, sums of squared deviations, covariances.

What is added to an element depends on that element alone, so that an array may be cut anywhere without moving a bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

TOGETHER = 2**15
"""Numbers that are worked on at once: what fits into a core's cache with its temporaries."""


def _together(values: Array) -> Iterator[slice]:
    """Rows of an array (R, …) a few at a time."""
    step = max(1, TOGETHER * len(values) // max(1, values.size))
    return (slice(first, first + step) for first in range(0, len(values), step))


def _each(count: NDArray[np.int64]) -> NDArray[np.int64] | np.int64:
    """Counts (R, T) to divide (R, T, m) by: one number if they are all the same, which is faster."""
    first: np.int64 = count.flat[0]
    return first if (count == first).all() else count[..., None]


def _joined(of: Sequence[object], *names: str) -> Iterator[NDArray[Any]]:
    """Each named array of several objects, which follow on each other along their second axis."""
    return (np.concatenate([getattr(one, name) for one in of], axis=1) for name in names)


class Welford:
    """Running mean and sum of squared deviations, elementwise, over blocks in which cells may be missing.

    Attributes:
        count: int64 (R, T): blocks with a finite value for the cell.
        mean, m2: float64 (R, T, m).
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.count = np.zeros(shape[:-1], dtype=np.int64)
        self.mean, self.m2 = np.zeros(shape), np.zeros(shape)

    def add(self, values: Array, present: NDArray[np.bool_] | None = None) -> None:
        """Take one block, (R, T, m); cells that are NaN are left out.

        Args:
            present: which are not, bool (R, T), if the caller knows.
        """
        present = np.asarray(np.isfinite(values).all(axis=-1)) if present is None else present
        self.count += present
        for rows in _together(values):
            self._add(values[rows], present[rows], self.count[rows], self.mean[rows], self.m2[rows])

    @staticmethod
    def _add(values: Array, present: NDArray[np.bool_], count: NDArray[np.int64], mean: Array, m2: Array) -> None:
        delta = values - mean
        if present.all():
            rest = delta / _each(count)
            mean += rest
            np.subtract(values, mean, out=rest)
            rest *= delta
            m2 += rest
            return
        where = np.expand_dims(present, -1)
        delta = np.where(where, delta, 0.0)
        mean += delta / np.maximum(count, 1)[..., None]
        m2 += np.where(where, delta * (values - mean), 0.0)

    @classmethod
    def joined(cls, of: Sequence[Welford]) -> Welford:
        """Of arrays that follow on each other along their second axis."""
        out = cls((0, 0))
        out.count, out.mean, out.m2 = _joined(of, "count", "mean", "m2")
        return out

    def sem(self) -> Array:
        """Standard error of the mean, NaN with fewer than two blocks."""
        k = self.count[..., None].astype(np.float64)
        return np.where(k > 1, np.sqrt(self.m2 / np.maximum(k - 1, 1) / np.maximum(k, 1)), np.nan)


class Comoment:
    """Running covariance of effects with their seed's training-only effect, elementwise; cells may be missing."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._count = np.zeros(shape[:-1], dtype=np.int64)
        self._mean, self._sum = np.zeros(shape), np.zeros(shape)

    def add(self, values: Array, baseline: Array, after: Welford, finite: NDArray[np.bool_] | None = None) -> None:
        """Take one block (R, T, m) with its baseline (T, m); ``after``: the moments of values, with this block.

        Args:
            finite: which values are not NaN, bool (R, T), if the caller knows.
        """
        finite = np.asarray(np.isfinite(values).all(axis=-1)) if finite is None else finite
        present: NDArray[np.bool_] = finite & np.asarray(np.isfinite(baseline).all(axis=-1))
        self._count += present
        for rows in _together(values):
            own, mean, total = values[rows], self._mean[rows], self._sum[rows]
            offset, count = baseline - mean, self._count[rows]
            if present[rows].all():
                mean += offset / _each(count)
                offset *= own - after.mean[rows]
                total += offset
                continue
            where = present[rows][..., None]
            offset = np.where(where, offset, 0.0)
            mean += offset / np.maximum(count, 1)[..., None]
            total += offset * np.where(where, own - after.mean[rows], 0.0)

    @classmethod
    def joined(cls, of: Sequence[Comoment]) -> Comoment:
        """As ``Welford.joined``."""
        out = cls((0, 0))
        out._count, out._mean, out._sum = _joined(of, "_count", "_mean", "_sum")
        return out

    def spread(self, effects: Welford) -> Array:
        """Var(Δ_i) − Var(Δ) over seeds, float64 (R, T, m): by how much removing i spreads g; NaN below two seeds.

        With Δ_i = effect + Δ this is Var(effect) + 2 Cov(effect, Δ) (distributional attribution, arXiv 2506.12965).
        """
        k = effects.count[..., None]
        return np.where(k > 1, (effects.m2 + 2 * self._sum) / np.maximum(k - 1, 1), np.nan)
