"""Two gold standards against each other: agreement over common removals, for each amount, and how high it could be.

The agreement is that of ``score.py``: cosine or Spearman over removals for each evaluation example, averaged over the
examples, those that are constant, drowned in rounding or exploded in either standard counted as undefined.

**Ceilings.** A mean over k seeds is the truth plus noise. For an evaluation example √ρ, with ρ the reliability of the
mean effects, is the highest cosine that anything can be expected to reach against it (``tables/trust.py``). Two
measurements of one truth agree at √(ρ₁ρ₂), the *joint ceiling*. All three are averaged over the examples. For Spearman
there is no closed form: ρ = 2r/(1+r) with r the Spearman correlation of the means over even and over odd seeds
(Spearman and Brown), an approximation.

**Shared noise.** Runs of one seed have one batch order in both sweeps, so their noise agrees and so do their means. A
cosine's ``shared`` is the part of it that this accounts for, from the covariance over common seeds; 0 without any.
``normalised`` = (score − shared) / joint ceiling estimates the agreement of the two truths: about 1 if they are one.
What common seeds add to a Spearman correlation is not known: both are null for it then.

Pure functions over values, seed by seed. Not here: which removals and steps are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fimo.orchestrator.tables import schemas as tables
from fimo.orchestrator.tables.agreement import adjusted, cosine, dot, mean_and_sem, undefined
from fimo.orchestrator.tables.moments import Welford
from fimo.orchestrator.tables.ordering import ranks
from fimo.orchestrator.tables.reduce import Reduction, SeedBlock, reduce
from fimo.orchestrator.tables.reliability import ADJUSTMENTS, trust_at
from fimo.orchestrator.tables.score import METRICS

Array = NDArray[np.float64]
CONFIDENCE = 0.95


def cut(blocks: Iterable[SeedBlock], places: Sequence[int], m: int) -> Iterator[SeedBlock]:
    """Blocks at some of their steps, by place (repeats allowed), and the first ``m`` evaluation examples."""
    at = list(places)
    for block in blocks:
        yield replace(
            block,
            effects=block.effects[:, at, :m],
            training_only=block.training_only[at, :m],
            floor_squares=block.floor_squares[at, :m],
            distance=None if block.distance is None else block.distance[at],
            at_final=None if block.at_final is None else block.at_final[:m],
            finite=None,
        )


class Standard:
    """One of the two gold standards, R removals × T steps × m evaluation examples, as its seeds stream past."""

    def __init__(self, reduction: Reduction, shape: tuple[int, int, int]) -> None:
        self.reduction = reduction
        self.halves = (Welford(shape), Welford(shape))

    def add(self, block: SeedBlock) -> None:
        """Take one seed; a step at which it lacks a removal is left out of what needs whole seeds."""
        self.halves[block.seed % 2].add(adjusted(block.effects, "mean"))

    def seeds(self) -> NDArray[np.int64]:
        """The most seeds that any removal has, (T,)."""
        most: NDArray[np.int64] = self.reduction.effects.count.max(axis=0)
        return most

    def gold(self, adjust: str, keep: NDArray[np.bool_]) -> Array:
        """The attribution under an adjustment, float64 (R', T, m)."""
        return adjusted(self.reduction.effects.mean[keep], adjust)

    def without(self, gold: Array) -> NDArray[np.bool_]:
        """Where ``gold`` says nothing, (T, m)."""
        floor = self.reduction.floors.of_mean(len(self.reduction.seeds))
        return undefined(gold, floor) | self.reduction.exploded[:, None]

    def ceilings(self, metric: str, adjust: str, keep: NDArray[np.bool_]) -> Array:
        """√ρ of every evaluation example, (T, m); NaN if there are too few seeds."""
        if metric == "spearman":
            first, second = (ranks(half.mean[keep]) for half in self.halves)
            r = np.maximum(cosine(first, second), 0)
            even, odd = (np.asarray((half.count[keep] > 0).all(axis=0)) for half in self.halves)
            return np.where((even & odd)[:, None], np.sqrt(2 * r / (1 + r)), np.nan)
        steps, m = self.reduction.floor.shape
        trusts = [trust_at(self.reduction, keep, place, adjust) for place in range(steps)]
        return np.stack([np.full(m, np.nan) if trust is None else trust.ceiling() for trust in trusts])

    def noise(self, adjust: str, keep: NDArray[np.bool_]) -> Array:
        """Σ_r sem_r² of every evaluation example, (T, m); NaN with one seed."""
        sem = (self.reduction.effects if adjust == "baseline" else self.reduction.centred).sem()[keep]
        return dot(sem, sem)


class Shared:
    """The covariance of two standards' effects over the seeds that both have, summed over removals."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.count = np.zeros(shape[1], dtype=np.int64)
        self._products = {adjust: np.zeros(shape[1:]) for adjust in ADJUSTMENTS}
        self._sums = {adjust: (np.zeros(shape), np.zeros(shape)) for adjust in ADJUSTMENTS}

    def add(self, own: SeedBlock, other: SeedBlock) -> None:
        """Take a seed that both have, at the steps at which it is whole in both."""
        present = np.asarray((np.isfinite(own.effects) & np.isfinite(other.effects)).all(axis=(0, 2)))
        self.count += present
        for adjust in ADJUSTMENTS:
            a, b = (np.where(present[:, None], adjusted(e.effects, adjust), 0.0) for e in (own, other))
            self._products[adjust] += dot(a, b)
            for sums, values in zip(self._sums[adjust], (a, b), strict=True):
                np.add(sums, values, out=sums)

    def of_means(self, adjust: str, own: Standard, other: Standard) -> Array:
        """Σ_r cov(ā_r, b̄_r) of the means over each standard's own seeds, (T, m); NaN if one common seed is all."""
        k = self.count[:, None].astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            each = (self._products[adjust] - dot(*self._sums[adjust]) / k) / (k - 1)
            means = each * k / (own.seeds() * other.seeds())[:, None]
        return np.where(k > 1, means, np.where(k == 1, np.nan, 0.0))


def by_seed(
    own: Iterable[SeedBlock], other: Iterable[SeedBlock]
) -> Iterator[tuple[SeedBlock | None, SeedBlock | None]]:
    """Two streams of ascending seeds as one: both blocks of a seed that both have, else one and None."""
    left, right = iter(own), iter(other)
    a, b = next(left, None), next(right, None)
    while a is not None or b is not None:
        seed = min(block.seed for block in (a, b) if block is not None)
        here_a, here_b = a is not None and a.seed == seed, b is not None and b.seed == seed
        yield (a if here_a else None), (b if here_b else None)
        a, b = next(left, None) if here_a else a, next(right, None) if here_b else b


@dataclass(frozen=True)
class Seen:
    """What both streams came to."""

    own: Standard
    other: Standard
    shared: Shared


def compare(
    own: Iterable[SeedBlock], other: Iterable[SeedBlock], removals: int, steps: Sequence[tuple[int, int]], m: int
) -> pa.Table:
    """Agreement of two gold standards: rows by metric, adjustment, pair of steps (``schemas.COMPARISON``).

    Args:
        own, other: seeds in ascending order, cut (see ``cut``) to the ``removals`` R common removals in one order, the
            pairs of ``steps`` (T) and the ``m`` common evaluation examples.

    A removal that either lacks at any step is left out; the table is empty if fewer than two are left.
    """
    shape = (removals, len(steps), m)
    (left, a), (right, b) = (reduce(blocks, *shape) for blocks in (own, other))
    seen = Seen(Standard(a, shape), Standard(b, shape), Shared(shape))
    for mine, theirs in by_seed(left, right):
        if mine is not None:
            seen.own.add(mine)
        if theirs is not None:
            seen.other.add(theirs)
        if mine is not None and theirs is not None:
            seen.shared.add(mine, theirs)
    keep = np.asarray((np.minimum(a.effects.count, b.effects.count) > 0).all(axis=1))
    rows = [
        row
        for metric in METRICS
        for adjust in ADJUSTMENTS
        for row in (_rows(seen, metric, adjust, keep, steps) if keep.sum() > 1 else ())
    ]
    columns = list(zip(*rows, strict=True)) or [() for _ in tables.COMPARISON]
    named = {f.name: list(c) for f, c in zip(tables.COMPARISON, columns, strict=True)}
    return tables.table(tables.COMPARISON, **named)


def _rows(
    seen: Seen, metric: str, adjust: str, keep: NDArray[np.bool_], steps: Sequence[tuple[int, int]]
) -> Iterator[tuple[object, ...]]:
    a, b = (side.gold(adjust, keep) for side in (seen.own, seen.other))
    without = seen.own.without(a) | seen.other.without(b)
    agreement = cosine(a, b) if metric == "cosine" else cosine(ranks(a), ranks(b))
    agreement = np.where(without, np.nan, agreement)
    mine, theirs = (side.ceilings(metric, adjust, keep) for side in (seen.own, seen.other))
    # What is not the truth's in either, as far as the noise of both is one.
    with np.errstate(divide="ignore", invalid="ignore"):
        size = np.sqrt(seen.own.noise(adjust, keep) * seen.other.noise(adjust, keep))
        alike = np.clip(seen.shared.of_means(adjust, seen.own, seen.other) / size, -1, 1)
    apart = np.sqrt(np.maximum(1 - mine**2, 0) * np.maximum(1 - theirs**2, 0))
    shared = np.where(size > 0, alike * apart, np.where(seen.shared.count[:, None] == 1, np.nan, 0.0))
    if metric == "spearman":
        shared = np.where(seen.shared.count[:, None] > 0, np.nan, np.zeros_like(agreement))
    seeds, other_seeds = seen.own.seeds(), seen.other.seeds()
    for place, (step, other_step) in enumerate(steps):
        score, sem, evals = mean_and_sem(agreement[place])
        defined = ~np.isnan(agreement[place])
        ceiling, other_ceiling, joint, noise = (
            _mean(values[place][defined]) for values in (mine, theirs, mine * theirs, shared)
        )
        known = score is not None and noise is not None and joint
        yield (
            *(metric, adjust, step, other_step, score, sem, *_interval(score, sem, evals)),
            *(evals, len(defined) - evals, int(keep.sum()), int(seeds[place]), int(other_seeds[place])),
            *(ceiling, other_ceiling, joint, noise, (score - noise) / joint if known else None),  # type: ignore[operator]
        )


def _mean(values: Array) -> float | None:
    """The mean; None if there is nothing, or anything unknown, to average."""
    return float(values.mean()) if len(values) and not np.isnan(values).any() else None


def _interval(score: float | None, sem: float | None, evals: int) -> tuple[float | None, float | None]:
    """Student's interval of a mean over evaluation examples, the removals held fixed; within −1 and 1."""
    if score is None or sem is None:
        return None, None
    from scipy.special import stdtrit  # slow to import; see ``agreement.ranks``

    half = float(stdtrit(evals - 1, (1 + CONFIDENCE) / 2)) * sem
    return max(-1.0, score - half), min(1.0, score + half)
