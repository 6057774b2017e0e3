"""Estimates laid beside one attribution after another: cosines and Spearman correlations with all of them at once.

What depends on the estimates alone is done once. Products of ranks are exact (``tables/ordering.py``), so those with
many estimates are one matrix product; other products are summed over the removals in their order, as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fimo.orchestrator.tables.agreement import divide, dot, norm
from fimo.orchestrator.tables.ordering import Ranks, ranks_last

Array = NDArray[np.float64]


class Beside:
    """Estimates ready to be compared with effects (R, T, m).

    Args:
        aligned: of each, its places among the T steps, and its values there, (R, 1 or T', m).

    Attributes:
        groups: the numbers of those that are at the same places, in the order given; agreements come group by group.
        places: of each group.
    """

    def __init__(self, aligned: Sequence[tuple[Sequence[int], Array]], steps: int) -> None:
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, (places, _) in enumerate(aligned):
            alike.setdefault(tuple(places), []).append(number)
        self.groups, self.places = list(alike.values()), [list(places) for places in alike]
        self._alike = [
            _Alike(places, [aligned[number][1] for number in numbers], steps) for places, numbers in alike.items()
        ]

    def spearman(self, effects: Array) -> list[Array]:
        """Spearman correlations over the removals, (E, T', m) of each group's E; NaN for a constant vector."""
        ranked = ranks_last(effects)
        norms = _rank_norm(ranked)
        return [of.spearman(ranked, norms) for of in self._alike]

    def cosine(self, gold: Array, norms: Array) -> list[Array]:
        """Cosines over the removals, (E, T', m) of each group's E; NaN for a vector of zeros.

        Args:
            gold: adjusted effects; ``norms``: of its vectors, (T, m).
        """
        return [of.cosine(gold, norms) for of in self._alike]


class _Alike:
    """Estimates that are at the same places among the steps."""

    def __init__(self, places: Sequence[int], values: Sequence[Array], steps: int) -> None:
        self._places = None if list(places) == list(range(steps)) else list(places)
        own = {number: self._lies(of) for number, of in enumerate(values)}
        shape = len(places), values[0].shape[-1]
        self._norms = np.stack([np.broadcast_to(norm(of), shape) for of in own.values()])
        ranked = [ranks_last(of) for of in own.values()]
        self._rank_norms = np.stack([np.broadcast_to(_rank_norm(of), shape) for of in ranked])
        # Of those that are of every amount, (m, E, R): one product for all steps and all of them.
        self._fixed = [number for number, of in enumerate(ranked) if len(of) == 1]
        self._fixed_ranks = np.stack([ranked[n][0] for n in self._fixed], axis=1) if self._fixed else None
        # Of the others, (T', m, E, R); and their values, (R, E, T', m), so that effects are read once for all of them.
        self._moving = [number for number, of in enumerate(ranked) if len(of) > 1]
        self._moving_ranks = np.stack([ranked[n] for n in self._moving], axis=2) if self._moving else None
        together = self._moving if shape[1] > 1 else []
        self._moving_values = np.stack([own.pop(n) for n in together], axis=1) if together else None
        self._values = own

    def spearman(self, ranked: Ranks, norms: Array) -> Array:
        """Of ranks (T, m, R) and their norms (T, m)."""
        at, norms = (of if self._places is None else of[self._places] for of in (ranked, norms))
        dots = np.empty(self._rank_norms.shape)
        if self._fixed_ranks is not None:
            dots[self._fixed] = np.matmul(self._fixed_ranks, at.transpose(1, 2, 0)).transpose(1, 2, 0)
        if self._moving_ranks is not None:
            dots[self._moving] = np.matmul(self._moving_ranks, at[..., None])[..., 0].transpose(2, 0, 1)
        return divide(dots, norms * self._rank_norms)

    def cosine(self, gold: Array, norms: Array) -> Array:
        """Of adjusted effects (R, T, m) and their norms (T, m)."""
        at = gold if self._places is None else self._lies(gold[:, self._places])
        norms = norms if self._places is None else norms[self._places]
        dots = np.empty(self._norms.shape)
        for number, values in self._values.items():
            dots[number] = dot(at, values)
        if self._moving_values is not None:
            # Summed over the removals in their order, as each by itself.
            dots[self._moving] = np.einsum("rtm,retm->etm", at, self._moving_values)
        return divide(dots, norms * self._norms)

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
