"""``reliability.parquet``, and the ceilings that scores are held against: how far the attribution can be trusted.

For the sweep's seeds as measured, and for other numbers of seeds extrapolated. One seed says nothing of its own noise:
no reliability and no ceiling then. What they are is said in ``fimo.orchestrator.tables.trust`` for cosines, and in
``fimo.orchestrator.tables.rank_ceilings`` for Spearman correlations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fimo.orchestrator.tables import schemas as tables
from fimo.orchestrator.tables.agreement import adjusted, undefined
from fimo.orchestrator.tables.groups import SeedGroups
from fimo.orchestrator.tables.rank_ceilings import rank_ceilings
from fimo.orchestrator.tables.reduce import Reduction
from fimo.orchestrator.tables.significance import p_values, share_significant
from fimo.orchestrator.tables.trust import Trust, moments

Array = NDArray[np.float64]
ADJUSTMENTS = ("baseline", "mean")
BEYOND = 100
"""Seeds to which reliability is extrapolated, and at least to twice those of the sweep."""


def windows(seeds: int) -> list[int]:
    """The numbers of seeds averaged: 1, 2, 5, 10, 20, 50, 100 … below ``seeds``, and ``seeds``."""
    series = [base * 10**power for power in range(10) for base in (1, 2, 5)]
    return [k for k in series if k < seeds] + ([seeds] if seeds else [])


def trust_at(reduction: Reduction, keep: NDArray[np.bool_], place: int, adjust: str) -> Trust | None:
    """What a reduction's whole seeds say of one step; None if there are fewer than two, or than two removals.

    Args:
        keep: the removals that count, bool (R,).
    """
    seeds = int(reduction.shift.count.max(initial=0))
    if seeds < 2 or keep.sum() < 2:
        return None
    centred, shift = reduction.centred, reduction.shift
    of = moments(seeds, centred.mean[keep, place], centred.m2[keep, place], shift.mean[0, place], shift.m2[0, place])
    return Trust(of, adjust)


class Reliability:
    """What a reduction's seeds say of their own mean.

    Args:
        reduction: final, of T steps and m evaluation examples.
        groups: its whole seeds.
        keep: the removals that count, bool (R,): those with a result at every step.
    """

    def __init__(self, reduction: Reduction, groups: SeedGroups, keep: NDArray[np.bool_]) -> None:
        self._reduction, self._keep = reduction, keep
        self.seeds = int(reduction.shift.count.max(initial=0))
        self._ranks = rank_ceilings(groups, keep) if self.seeds > 1 else None
        self._trusts: dict[tuple[str, int], Trust] = {}
        self._ceilings: dict[tuple[str, str, int], Array | None] = {}
        self._p: dict[str, Array] = {}

    @property
    def known(self) -> bool:
        """Whether there is any: two whole seeds and two removals at least."""
        return self.seeds > 1 and int(self._keep.sum()) > 1

    def without(self, adjust: str) -> NDArray[np.bool_]:
        """The evaluation examples that say nothing at a step, bool (T, m): constant, drowned in rounding, exploded."""
        reduction = self._reduction
        gold = adjusted(reduction.effects.mean[self._keep], adjust)
        floor = reduction.floors.of_mean(len(reduction.seeds), adjust)
        return undefined(gold, floor) | reduction.exploded[:, None]

    def trust(self, adjust: str, place: int) -> Trust:
        """At one step; only if ``known``."""
        if (adjust, place) not in self._trusts:
            trust = trust_at(self._reduction, self._keep, place, adjust)
            assert trust is not None
            self._trusts[adjust, place] = trust
        return self._trusts[adjust, place]

    def ceilings(self, metric: str, adjust: str, seeds: int) -> Array | None:
        """Per evaluation example against a mean over ``seeds``, float64 (T, m); None if there are none."""
        named = "cosine" if metric == "cosine" else "spearman", adjust, seeds
        if named not in self._ceilings:
            self._ceilings[named] = self._ceiling(*named)
        return self._ceilings[named]

    def _ceiling(self, metric: str, adjust: str, seeds: int) -> Array | None:
        if not self.known:
            return None
        if metric != "cosine":
            return None if self._ranks is None else self._ranks.at(seeds)[1]
        here = None if seeds == self.seeds else seeds
        return np.stack([self.trust(adjust, place).ceiling(here) for place in range(self._reduction.floor.shape[0])])

    def table(self, steps: Sequence[int]) -> pa.Table:
        """``reliability.parquet``: rows by step, adjustment, seeds.

        ``ceiling`` is that of a cosine. ``significant`` is known for the sweep's own seeds alone.
        """
        return tables.from_rows(tables.RELIABILITY, self.rows(steps))

    def rows(self, steps: Sequence[int]) -> Iterator[tuple[object, ...]]:
        """The table's rows."""
        for place, step in enumerate(steps):
            for adjust in ADJUSTMENTS:
                yield from self._rows(place, step, adjust)

    def _rows(self, place: int, step: int, adjust: str) -> Iterator[tuple[object, ...]]:
        seeds = len(self._reduction.seeds)
        others = windows(max(BEYOND, 2 * seeds)) if self.known else []
        for k in sorted({*others, seeds} - {0}):
            measured = k == seeds
            rho, ceiling, lower, upper = self._figures(place, adjust, k)
            floor = self._floor(place, k, adjust)
            share = self._significant(place, adjust) if measured else None
            yield step, adjust, k, measured, rho, ceiling, floor, share, lower, upper

    def _figures(self, place: int, adjust: str, k: int) -> tuple[float | None, ...]:
        """Reliability, ceiling, and the bounds for Spearman, each the mean over the examples that say something."""
        defined = ~self.without(adjust)[place] if self.known else np.zeros(0, dtype=bool)
        if not defined.any():
            return None, None, None, None
        trust = self.trust(adjust, place)
        here = None if k == self.seeds else k
        rho, ceiling = (float(v[defined].mean()) for v in (trust.reliability(here), trust.ceiling(here)))
        if self._ranks is None:
            return rho, ceiling, None, None
        lower, _, upper = self._ranks.at(k)
        return rho, ceiling, float(lower[place][defined].mean()), float(upper[place][defined].mean())

    def _floor(self, place: int, k: int, adjust: str) -> float:
        """Root mean square over evaluation examples of what rounding alone does to a mean over ``k`` seeds."""
        return float(np.sqrt(np.square(self._reduction.floors.of_mean(k, adjust)[place]).mean()))

    def _significant(self, place: int, adjust: str) -> float | None:
        reduction, keep = self._reduction, self._keep
        of = reduction.effects if adjust == "baseline" else reduction.centred
        if adjust not in self._p:
            self._p[adjust] = p_values(of.mean[keep], of.sem()[keep], of.count[keep][..., None])
        floor = reduction.floors.of_mean(len(reduction.seeds), adjust)[place]
        return share_significant(self._p[adjust][:, place], np.abs(of.mean[keep, place]) <= floor)
