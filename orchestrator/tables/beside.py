"""Estimates laid beside one attribution after another: cosines and Spearman correlations with all of them at once.

What depends on the estimates alone is done once. Products of ranks are exact (``tables/ordering.py``), so those with
many estimates are one matrix product; other products are summed over the removals in their order, as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fimo.orchestrator.tables.agreement import divide, dot, norm
from fimo.orchestrator.tables.ordering import ranks_last

Array = NDArray[np.float64]


class Beside:
    """Estimates ready to be compared with effects (R, T, m).

    Args:
        aligned: of each, its places among the T steps, and its values there, (R, 1 or T', m).

    Attributes:
        places: of each.
    """

    def __init__(self, aligned: Sequence[tuple[Sequence[int], Array]], steps: int) -> None:
        self.places = [list(places) for places, _ in aligned]
        self._values = [self._lies(values) for _, values in aligned]
        self._norms = [norm(values) for values in self._values]
        self._everywhere = [places == list(range(steps)) for places in self.places]
        ranked = [ranks_last(values) for values in self._values]
        self._rank_norms = [_rank_norm(of) for of in ranked]
        # Of those that are of every amount, (m, E, R): one product for all steps and all of them.
        self._fixed = [number for number, of in enumerate(ranked) if len(of) == 1 and self._everywhere[number]]
        self._fixed_ranks = np.stack([ranked[n][0] for n in self._fixed], axis=1) if self._fixed else None
        self._ranked = {number: of for number, of in enumerate(ranked) if number not in self._fixed}

    def spearman(self, effects: Array) -> list[Array]:
        """Spearman correlations over the removals with each estimate, (T', m) each; NaN for a constant vector."""
        ranked = ranks_last(effects)
        norms = _rank_norm(ranked)
        dots: dict[int, Array] = {}
        if self._fixed_ranks is not None:
            products = np.matmul(self._fixed_ranks, ranked.transpose(1, 2, 0))
            for place, number in enumerate(self._fixed):
                dots[number] = products[:, place].T.astype(np.float64)
        for number, own in self._ranked.items():
            at = ranked if self._everywhere[number] else ranked[self.places[number]]
            dots[number] = _inner(own, at)
        return [
            divide(dots[number], self._at(number, norms, 0) * self._rank_norms[number])
            for number in range(len(self.places))
        ]

    def cosine(self, gold: Array, norms: Array) -> list[Array]:
        """Cosines over the removals with each estimate, (T', m) each; NaN for a vector of zeros.

        Args:
            gold: adjusted effects; ``norms``: of its vectors, (T, m).
        """
        return [
            divide(dot(self._at(number, gold, 1), values), self._at(number, norms, 0) * self._norms[number])
            for number, values in enumerate(self._values)
        ]

    def _at(self, number: int, of: Array, axis: int) -> Array:
        """An array over the T steps where an estimate has them."""
        if self._everywhere[number]:
            return of
        return self._lies(of[:, self.places[number]] if axis else of[self.places[number]])

    @staticmethod
    def _lies(of: Array) -> Array:
        """In the order of its axes, which is faster to sum over the first.

        Not if there is one evaluation example: then the order in which numpy adds, and so the last bit, would change.
        """
        return of if of.shape[-1] == 1 else np.ascontiguousarray(of)


def _inner(a: NDArray[np.floating], b: NDArray[np.floating]) -> Array:
    """Inner products of ranks over the last axis."""
    out: Array = np.matmul(a[..., None, :], b[..., :, None])[..., 0, 0].astype(np.float64)
    return out


def _rank_norm(ranked: NDArray[np.floating]) -> Array:
    out: Array = np.sqrt(_inner(ranked, ranked))
    return out
