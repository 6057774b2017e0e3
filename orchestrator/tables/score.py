"""Scores: how close each estimate comes to the attribution, per step and per number of seeds averaged.

A score is the mean over evaluation examples of the agreement over removals. For k seeds, the effects of disjoint
windows of k consecutive seeds are averaged, scored, and the scores of the windows averaged. Pure functions over values.

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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fimo.orchestrator.tables import schemas as tables
from fimo.orchestrator.tables.agreement import adjusted, cosine, mean_and_sem, norm, ranks, undefined
from fimo.orchestrator.tables.reduce import Reduction, SeedBlock
from fimo.orchestrator.tables.sanity import exploded

Array = NDArray[np.float64]
METRICS = ("cosine", "spearman")
LDS = "lds"
ADJUSTMENTS = ("baseline", "mean")


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

    def against(self, steps: Sequence[int]) -> tuple[list[int], Array]:
        """Places among the sweep's steps that can be scored, and the values there, (R, 1 or S', m)."""
        if self.steps is None:
            return list(range(len(steps))), self.values[:, None, :]
        own = {step: place for place, step in enumerate(self.steps)}
        places = [place for place, step in enumerate(steps) if step in own]
        chosen = self.values[[own[steps[place]] for place in places]]
        return places, np.moveaxis(chosen, 0, 1)


def windows(seeds: int) -> list[int]:
    """The numbers of seeds averaged: 1, 2, 5, 10, 20, 50, 100 … below ``seeds``, and ``seeds``."""
    series = [base * 10**power for power in range(10) for base in (1, 2, 5)]
    return [k for k in series if k < seeds] + ([seeds] if seeds else [])


@dataclass
class _Agreements:
    """Sums over windows of per-example agreements: [estimate][metric][adjust] -> (T, m), and how many were defined."""

    total: dict[tuple[int, str, str], Array] = field(default_factory=dict)
    count: dict[tuple[int, str, str], NDArray[np.int64]] = field(default_factory=dict)

    def add(self, key: tuple[int, str, str], values: Array) -> None:
        defined = ~np.isnan(values)
        self.total[key] = self.total.get(key, 0.0) + np.where(defined, values, 0.0)
        self.count[key] = self.count.get(key, 0) + defined

    def mean(self, key: tuple[int, str, str]) -> Array:
        return np.where(self.count[key] > 0, self.total[key] / np.maximum(self.count[key], 1), np.nan)


class Scorer:
    """Scores averages over windows of seeds as blocks stream past.

    Seeds that lack a removal are left out of the windows; the score of *all* seeds is taken of the attribution itself.

    Args:
        steps: the sweep's T steps.
        seeds: how many seeds the sweep is expected to have, which fixes the windows.
        random_groups: the removals are random groups of one size, so that ``lds`` is a metric too.
    """

    def __init__(
        self, estimates: Sequence[EstimateMatrix], steps: Sequence[int], seeds: int, random_groups: bool = False
    ) -> None:
        self.estimates, self.steps = list(estimates), list(steps)
        self.metrics = (*METRICS, LDS) if random_groups else METRICS
        self._aligned = [e.against(steps) for e in self.estimates]
        self._ranked = [ranks(values) for _, values in self._aligned]
        self._norms = [(norm(v), norm(r)) for (_, v), r in zip(self._aligned, self._ranked, strict=True)]
        self.results = {k: _Agreements() for k in windows(seeds)[:-1]}
        self._sums: dict[int, Array] = {}
        self._beyond: dict[int, NDArray[np.bool_]] = {}
        self._held: dict[int, int] = dict.fromkeys(self.results, 0)
        self.halves: list[Array | float] = [0.0, 0.0]
        self.half_counts = [0, 0]
        self.complete = 0

    def add(self, block: SeedBlock, floor: Array) -> None:
        """Take one seed; ``floor`` (T, m) is the noise of one effect as known so far."""
        if not block.complete:
            return
        half = self.complete % 2
        self.halves[half] = self.halves[half] + block.effects
        self.half_counts[half] += 1
        self.complete += 1
        beyond = exploded(block.training_only, block.scale)
        for k, result in self.results.items():
            self._sums[k] = self._sums[k] + block.effects if self._held[k] else block.effects
            self._beyond[k] = self._beyond[k] | beyond if self._held[k] else beyond
            self._held[k] += 1
            if self._held[k] == k:
                self._score(result, self._sums[k] / k, floor / np.sqrt(k), self._beyond[k])
                self._held[k] = 0

    def _score(self, result: _Agreements, effects: Array, floor: Array, beyond: NDArray[np.bool_]) -> None:
        ranked = ranks(effects)
        ranked_norm = norm(ranked)
        for adjust in ADJUSTMENTS:
            gold = adjusted(effects, adjust)
            without, gold_norm = undefined(gold, floor) | beyond[:, None], norm(gold)
            for number, (places, values) in enumerate(self._aligned):
                # Indexing with a list copies, so an estimate of every amount takes the arrays as they are.
                at = slice(None) if len(places) == len(self.steps) else places
                plain, by_rank = self._norms[number]
                spearman = cosine(ranked[:, at], self._ranked[number], ranked_norm[at], by_rank)
                agreements = {
                    "cosine": cosine(gold[:, at], values, gold_norm[at], plain),
                    "spearman": spearman,
                    LDS: spearman,
                }
                for metric in self.metrics:
                    result.add((number, metric, adjust), np.where(without[places], np.nan, agreements[metric]))

    def finish(self, reduction: Reduction) -> None:
        """Score the attribution itself: all seeds, removals without any finite seed left out."""
        if not reduction.seeds:
            return
        result = self.results[len(reduction.seeds)] = _Agreements()
        everywhere = np.asarray((reduction.effects.count > 0).all(axis=1))
        if everywhere.sum() < 2:
            return
        kept = Scorer([_rows(e, everywhere) for e in self.estimates], self.steps, 0, LDS in self.metrics)
        floor = reduction.floor / np.sqrt(len(reduction.seeds))
        kept._score(result, reduction.effects.mean[everywhere], floor, reduction.exploded)

    def table(self) -> pa.Table:
        """``scores.parquet``, rows by estimator in spec order, metric, adjustment, seeds, step."""
        rows: list[tuple[object, ...]] = []
        for number, estimate in enumerate(self.estimates):
            places = self._aligned[number][0]
            for metric in self.metrics:
                for adjust in ADJUSTMENTS:
                    for k in sorted(self.results):
                        result = self.results[k]
                        if (number, metric, adjust) not in result.total:
                            continue
                        agreement = result.mean((number, metric, adjust))
                        for row, place in enumerate(places):
                            score, sem, evals = mean_and_sem(agreement[row])
                            about = (estimate.estimator, estimate.params, metric, adjust, k, self.steps[place])
                            rows.append((*about, score, sem, evals, agreement.shape[1] - evals))
        return _table(tables.SCORES, rows)

    def reliability(self, floor: Array) -> pa.Table:
        """``reliability.parquet``: split halves over alternate seeds, and what they bound.

        ``split_half`` is the mean over evaluation examples of the cosine between the attributions of either half of the
        seeds; by Spearman and Brown, the attribution of all has reliability 2r/(1+r), whose square root is the highest
        cosine that an estimator can be expected to reach against it.
        """
        rows: list[tuple[object, ...]] = []
        counts = min(self.half_counts)
        first, second = (np.asarray(h) / max(c, 1) for h, c in zip(self.halves, self.half_counts, strict=True))
        noise = np.sqrt((floor * floor).mean(axis=1))
        for place, step in enumerate(self.steps):
            split, ceiling = None, None
            if counts:
                quiet = floor[place] / np.sqrt(counts)
                without = undefined(first[:, place], quiet) | undefined(second[:, place], quiet)
                split, _, _ = mean_and_sem(np.where(without, np.nan, cosine(first[:, place], second[:, place])))
                ceiling = float(np.sqrt(2 * split / (1 + split))) if split is not None and split > 0 else None
            rows.append((step, sum(self.half_counts), split, ceiling, float(noise[place])))
        return _table(tables.RELIABILITY, rows)


def _rows(estimate: EstimateMatrix, keep: NDArray[np.bool_]) -> EstimateMatrix:
    values = estimate.values[keep] if estimate.steps is None else estimate.values[:, keep]
    return EstimateMatrix(estimate.estimator, estimate.params, values, estimate.steps)


def similarity_table(estimates: Sequence[EstimateMatrix]) -> pa.Table:
    """``similarity.parquet``: mean cosine between any two estimators over evaluation examples.

    ``step`` is null if neither depends on the amount of further training.
    """
    rows: list[tuple[object, ...]] = []
    for a in estimates:
        for b in estimates:
            steps: list[int | None] = [None]
            if a.steps is not None or b.steps is not None:
                steps = [*sorted(set(a.steps or b.steps or ()) & set(b.steps or a.steps or ()))]
            for step in steps:
                agreement = cosine(_at(a, step), _at(b, step))
                score, sem, evals = mean_and_sem(agreement)
                rows.append(
                    (a.estimator, a.params, b.estimator, b.params, step, score, sem, evals, len(agreement) - evals)
                )
    return _table(tables.SIMILARITY, rows)


def _at(estimate: EstimateMatrix, step: int | None) -> Array:
    if estimate.steps is None or step is None:
        return estimate.values
    values: Array = estimate.values[estimate.steps.index(step)]
    return values


def _table(schema: pa.Schema, rows: Iterable[tuple[object, ...]]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [() for _ in schema]
    return tables.table(schema, **{f.name: list(c) for f, c in zip(schema, columns, strict=True)})
