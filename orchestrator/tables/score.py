"""Scores: how close each estimate comes to the attribution, per step and per number of seeds averaged.

A score is the mean over evaluation examples of the agreement over removals. For k seeds, the effects of disjoint
windows of k consecutive seeds are averaged, scored, and the scores of the windows averaged. An interval is of seeds and
evaluation examples together (``tables/intervals.py``), a ceiling what a perfect estimate would reach. Pure functions.

**lds**, the linear datamodeling score (Ilyas et al. 2022; Park et al., TRAK, 2023, section 2), is the Spearman
correlation over random groups S_j of training examples, all of one size, between g after training on S_j and the sum
of the attributions τ_i of its members. Here a removal is a random group G_j, S_j is the rest, and the effect is g
without G_j less the baseline's, which is the same for every j. Positive means that removing raises g, so τ = −â and
Σ_{i∈S_j} τ_i = const + Σ_{i∈G_j} â_i. The ranks over j, and so the score, are those of the effect and of the estimate
summed over the removed group. It is computed as ``spearman`` is, and differs in where it is defined: only if every
removal is such a random group (``fraction`` in a spec). Estimates of a group are sums over it, but for ``unrolled`` in
drop and mask, whose value is of the group as a whole, and for imported matrices, which are taken as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fimo.orchestrator.tables import schemas as tables
from fimo.orchestrator.tables.agreement import adjusted, mean_and_sem, norm, undefined
from fimo.orchestrator.tables.beside import Beside
from fimo.orchestrator.tables.groups import SeedGroups
from fimo.orchestrator.tables.intervals import Spread, interval
from fimo.orchestrator.tables.reduce import Reduction, SeedBlock
from fimo.orchestrator.tables.reliability import ADJUSTMENTS, Reliability, windows
from fimo.orchestrator.tables.sanity import exploded

Array = NDArray[np.float64]
METRICS = ("cosine", "spearman")
LDS = "lds"
Key = tuple[int, str, str]
"""Number of an estimate, metric, adjustment."""


@dataclass(frozen=True)
class EstimateMatrix:
    """An estimator's matrix.

    Attributes:
        params: canonical JSON.
        values: float64 (R, m), or (S, R, m) if ``steps`` (S) is given; NaN for a missing value.
    """

    estimator: str
    params: str
    values: Array
    steps: tuple[int, ...] | None = None

    def at(self, steps: Sequence[int]) -> EstimateMatrix:
        """The estimate at those of its steps that are among these."""
        if self.steps is None or set(self.steps) <= set(steps):
            return self
        kept = [place for place, step in enumerate(self.steps) if step in steps]
        return replace(self, values=self.values[kept], steps=tuple(self.steps[place] for place in kept))

    def against(self, steps: Sequence[int]) -> tuple[list[int], Array]:
        """Places among the sweep's steps that can be scored, and the values there, (R, 1 or S', m)."""
        if self.steps is None:
            return list(range(len(steps))), self.values[:, None, :]
        own = {step: place for place, step in enumerate(self.steps)}
        places = [place for place, step in enumerate(steps) if step in own]
        chosen = self.values[[own[steps[place]] for place in places]]
        return places, np.moveaxis(chosen, 0, 1)


@dataclass
class _Agreements:
    """Sums over windows of per-example agreements, how many were defined, and their spread over windows.

    ``count`` is of windows in which some were not, ``everywhere`` of the others.

    One array (keys, T', m) for each group of keys.
    """

    total: list[Array] = field(default_factory=list)
    count: list[NDArray[np.int64]] = field(default_factory=list)
    everywhere: list[int] = field(default_factory=list)
    spread: list[Spread] = field(default_factory=list)

    def add(self, found: Sequence[Array]) -> None:
        if not self.total:
            self.total = [np.zeros(values.shape) for values in found]
            self.count = [np.zeros(values.shape, dtype=np.int64) for values in found]
            self.everywhere = [0 for _ in found]
            self.spread = [Spread() for _ in found]
        for group, values in enumerate(found):
            defined = ~np.isnan(values)
            if defined.all():
                self.total[group] += values
                self.everywhere[group] += 1
            else:
                np.add(self.total[group], values, out=self.total[group], where=defined)
                self.count[group] += defined
            self.spread[group].add(values)

    def mean(self, group: int) -> Array:
        count = self.count[group] + self.everywhere[group]
        return np.where(count > 0, self.total[group] / np.maximum(count, 1), np.nan)


class Scorer:
    """Scores averages over windows of seeds as blocks stream past.

    Seeds that lack a removal are left out of the windows; the score of *all* seeds is taken of the attribution itself.

    Args:
        steps: the sweep's T steps.
        seeds: how many seeds the sweep is expected to have, which fixes the windows.
        random_groups: the removals are random groups of one size, so that ``lds`` is a metric too.
        whole: as for ``SeedGroups``.
    """

    def __init__(
        self,
        estimates: Sequence[EstimateMatrix],
        steps: Sequence[int],
        seeds: int,
        random_groups: bool = False,
        whole: int | None = None,
    ) -> None:
        self.estimates, self.steps = list(estimates), list(steps)
        self.metrics = (*METRICS, LDS) if random_groups else METRICS
        self._beside = Beside([e.against(steps) for e in self.estimates], len(self.steps))
        self._groups = self._grouped()
        self.results = {k: _Agreements() for k in windows(seeds)[:-1]}
        self._sums: dict[int, Array] = {}
        self._arrays: list[Array] = []
        self._beyond: dict[int, NDArray[np.bool_]] = {}
        self._held: dict[int, int] = dict.fromkeys(self.results, 0)
        self._without_one: list[Spread] = []
        self.groups = SeedGroups(whole)
        self.reliability: Reliability | None = None

    def add(self, block: SeedBlock, floor: Array) -> None:
        """Take one seed; ``floor`` (T, m) is the noise of one effect as known so far."""
        if not block.complete:
            return
        self.groups.add(block.effects)
        if len(block.effects) < 2:
            # An agreement over one removal is none: rows of nothing would pass for a table of few seeds.
            return
        beyond = exploded(block.training_only, block.scale)
        # Windows that began with the same seed have the same sum so far: one array, added to once.
        summed = {0: block.effects}
        for k, result in self.results.items():
            held = self._held[k]
            if held not in summed:
                out = self._spare(summed, block.effects) if held == 1 else self._sums[k]
                summed[held] = np.add(self._sums[k], block.effects, out=out)
            self._sums[k] = summed[held]
            self._beyond[k] = self._beyond[k] | beyond if self._held[k] else beyond
            self._held[k] += 1
            if self._held[k] == k:
                effects = self._sums[k] / k if k > 1 else block.effects
                result.add(self._agreements(effects, floor / np.sqrt(k), self._beyond[k]))
                self._held[k] = 0

    def _spare(self, summed: Mapping[int, Array], like: Array) -> Array:
        """An array that no window's sum lies in: a new one would have to be paged in."""
        used = {id(self._sums[k]) for k, held in self._held.items() if held} | {id(of) for of in summed.values()}
        for array in self._arrays:
            if id(array) not in used:
                return array
        self._arrays.append(np.empty_like(like))
        return self._arrays[-1]

    def agreements(self, effects: Array, floor: Array, beyond: NDArray[np.bool_]) -> Iterator[tuple[Key, Array]]:
        """Each agreement of each estimate with effects (R, T, m), per step and example; NaN where undefined."""
        found = self._agreements(effects, floor, beyond)
        for key, (group, place) in self._groups.items():
            yield key, found[group][place]

    def _grouped(self) -> dict[Key, tuple[int, int]]:
        """Of each key, its group, those of estimates at the same steps, and its place there."""
        out: dict[Key, tuple[int, int]] = {}
        for group, numbers in enumerate(self._beside.groups):
            keys = [(number, metric, adjust) for adjust in ADJUSTMENTS for number in numbers for metric in self.metrics]
            out.update({key: (group, place) for place, key in enumerate(keys)})
        return out

    def _agreements(self, effects: Array, floor: Array, beyond: NDArray[np.bool_]) -> list[Array]:
        """The same by group, (keys, T', m) each."""
        by_rank = self._beside.spearman(effects)
        found = [np.empty((len(ADJUSTMENTS), len(of), len(self.metrics), *of.shape[1:])) for of in by_rank]
        for adjust, of_adjust in zip(ADJUSTMENTS, zip(*found, strict=True), strict=False):
            gold = adjusted(effects, adjust)
            norms = norm(gold)
            without = undefined(gold, floor, norms) | beyond[:, None]
            for group, cosine in enumerate(self._beside.cosine(gold, norms)):
                values, nowhere = of_adjust[group], without[self._beside.places[group]]
                values[:, 0], values[:, 1:] = cosine, by_rank[group][:, None]
                if nowhere.any():
                    np.copyto(values, np.nan, where=nowhere)
        return [of.reshape(math.prod(of.shape[:3]), *of.shape[3:]) for of in found]

    def finish(self, reduction: Reduction, everywhere: NDArray[np.bool_] | None = None) -> None:
        """Score the attribution itself: all seeds, removals without any finite seed left out.

        Args:
            everywhere: the removals that have one at every step of the sweep, bool (R,), if these are not all steps.
        """
        if everywhere is None:
            everywhere = np.asarray((reduction.effects.count > 0).all(axis=1))
        self.reliability = Reliability(reduction, self.groups, everywhere)
        if not reduction.seeds:
            return
        result = self.results[len(reduction.seeds)] = _Agreements()
        if everywhere.sum() < 2:
            return
        kept = Scorer([rows_of(e, everywhere) for e in self.estimates], self.steps, 0, LDS in self.metrics)
        floor = reduction.floors.of_mean(len(reduction.seeds))
        result.add(kept._agreements(reduction.effects.mean[everywhere], floor, reduction.exploded))
        nowhere, means = np.zeros_like(reduction.exploded), [result.mean(group) for group in range(len(result.total))]
        self._without_one = [Spread() for _ in means]
        for _, _, others, _ in self.groups.left_out(everywhere):
            found = kept._agreements(others, np.zeros_like(floor), nowhere)
            for spread, mean, values in zip(self._without_one, means, found, strict=True):
                spread.add(np.where(np.isnan(mean), np.nan, values))

    def reliability_table(self) -> pa.Table:
        """``reliability.parquet``; without rows if there is no seed."""
        return tables.RELIABILITY.empty_table() if self.reliability is None else self.reliability.table(self.steps)

    def table(self) -> pa.Table:
        """``scores.parquet``, rows by estimator in spec order, metric, adjustment, seeds, step."""
        return tables.from_rows(tables.SCORES, (row for rows in self.rows() for row in rows))

    def rows(self) -> Iterator[list[tuple[object, ...]]]:
        """Its rows, in lists of those that differ in their step alone."""
        scored = {k: self._scored(k) for k in sorted(self.results) if self.results[k].total}
        for number, estimate in enumerate(self.estimates):
            for metric in self.metrics:
                for adjust in ADJUSTMENTS:
                    key = (number, metric, adjust)
                    for k, of in scored.items():
                        about = (estimate.estimator, estimate.params, metric, adjust, k)
                        yield [(*about, *row) for row in self._rows(key, k, of)]

    def _scored(self, k: int) -> list[tuple[Array, Array, Array, int]]:
        """Of each group: agreements (keys, T', m), the variances of their means (keys, T'), how many replicates."""
        result, last = self.results[k], k == max(self.results)
        spreads = self._without_one if last and self._without_one and self._without_one[0].count else result.spread
        jackknife = last and spreads is self._without_one
        return [(result.mean(g), *of.variances(jackknife), of.count) for g, of in enumerate(spreads)]

    def _rows(self, key: Key, k: int, scored: list[tuple[Array, Array, Array, int]]) -> Iterator[tuple[object, ...]]:
        """What a row says beside its names, for each step that can be scored."""
        _, metric, adjust = key
        group, at = self._groups[key]
        agreements, seeds, both, count = scored[group]
        ceilings = self.reliability.ceilings(metric, adjust, k) if self.reliability is not None else None
        for row, place in enumerate(self._beside.places[group]):
            values = agreements[at, row]
            score, sem, evals = mean_and_sem(values)
            low, high = interval(values, float(seeds[at, row]), float(both[at, row]), count) or (None, None)
            ceiling = None
            if ceilings is not None and evals:
                ceiling = float(ceilings[place][~np.isnan(values)].mean())
            normalised = score / ceiling if score is not None and ceiling else None
            yield self.steps[place], score, sem, low, high, ceiling, normalised, evals, len(values) - evals


def rows_of(estimate: EstimateMatrix, keep: NDArray[np.bool_]) -> EstimateMatrix:
    """An estimate of some of its removals, bool (R,)."""
    values = estimate.values[keep] if estimate.steps is None else estimate.values[:, keep]
    return EstimateMatrix(estimate.estimator, estimate.params, values, estimate.steps)
