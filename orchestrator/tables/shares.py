"""A sweep's steps in shares, each reduced and scored by itself.

Invariant: what a step comes to depends on no other step, but for two things that a seed's block says of all steps:
whether the seed is whole, and which removals it has. So tables are the same bytes however steps are shared out. Not so
evaluation examples: scores are summed over them, and sums of parts differ from the sum in their last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fimo.orchestrator.tables import schemas
from fimo.orchestrator.tables.floor import Floor, Measured
from fimo.orchestrator.tables.moments import Comoment, Welford
from fimo.orchestrator.tables.reduce import Reducer, Reduction, SeedBlock
from fimo.orchestrator.tables.score import EstimateMatrix, Scorer

Array = NDArray[np.float64]
TOGETHER = 2**21
"""Bytes of a seed's effects that are worked on at once: with their estimates they fit into a core's own cache."""
Row = tuple[object, ...]


@dataclass(frozen=True)
class Course:
    """What a sweep's seeds are reduced to.

    Attributes:
        removals: R; ``evals``: m; ``seeds``: how many are expected, which fixes the windows of scores.
        random_groups: see ``Scorer``.
        rounding: what witnesses say of all steps.
        whole: bytes of a seed's effects at all steps of the sweep.
    """

    estimates: tuple[EstimateMatrix, ...]
    steps: tuple[int, ...]
    removals: int
    evals: int
    seeds: int
    random_groups: bool
    rounding: Measured
    whole: int

    def at(self, span: slice) -> Course:
        """The same of some of the steps."""
        steps = self.steps[span]
        estimates = tuple(e.at(steps) for e in self.estimates)
        return replace(self, estimates=estimates, steps=steps, rounding=self.rounding.at(span))


@dataclass(frozen=True)
class Reduced:
    """What the seeds come to at some steps.

    Attributes:
        scores: rows of ``scores.parquet``, in lists of those that differ in their step alone.
        reliability: rows of ``reliability.parquet``.
    """

    reduction: Reduction
    scores: list[list[Row]]
    reliability: list[Row]

    def tables(self) -> tuple[pa.Table, pa.Table]:
        """``scores`` and ``reliability``."""
        scores = (row for rows in self.scores for row in rows)
        return (
            schemas.from_rows(schemas.SCORES, scores),
            schemas.from_rows(schemas.RELIABILITY, self.reliability),
        )


class Share:
    """Some steps of a sweep, as seeds are given one after another; worked on a few steps at a time."""

    def __init__(self, of: Course) -> None:
        self._of = of
        self._spans = spans(of, of.removals * of.evals * 8 * len(of.steps) // TOGETHER + 1)
        self._each = [_Few(of.at(span)) for span in self._spans]

    def add(self, block: SeedBlock) -> None:
        """Take one seed's block, cut to the share's steps."""
        for span, few in zip(self._spans, self._each, strict=True):
            few.add(block if len(self._spans) == 1 else block.at(span))

    def finish(self, everywhere: NDArray[np.bool_]) -> Reduced:
        """What the seeds came to.

        Args:
            everywhere: the removals that some seed has at every step of the sweep, bool (R,).
        """
        # One after another, so that what it took to score one is gone before the next.
        done = []
        while self._each:
            done.append(self._each.pop(0).finish(everywhere))
        return joined(done)


class _Few:
    def __init__(self, of: Course) -> None:
        self._reducer = Reducer(of.removals, len(of.steps), of.evals, of.rounding)
        self._scorer = Scorer(of.estimates, of.steps, of.seeds, of.random_groups, of.whole)

    def add(self, block: SeedBlock) -> None:
        self._reducer.add(block)
        self._scorer.add(block, self._reducer.reduction.floor)

    def finish(self, everywhere: NDArray[np.bool_]) -> Reduced:
        scorer, reduction = self._scorer, self._reducer.reduction
        scorer.finish(reduction, everywhere)
        reliable = [] if scorer.reliability is None else list(scorer.reliability.rows(scorer.steps))
        return Reduced(reduction, list(scorer.rows()), reliable)


class Presence:
    """Which removals a sweep's seeds have, over all steps."""

    def __init__(self, of: Course) -> None:
        self._seen = np.zeros((of.removals, len(of.steps)), dtype=np.bool_)

    def add(self, block: SeedBlock) -> None:
        """Take one seed, of all steps."""
        self._seen |= block.present

    @property
    def everywhere(self) -> NDArray[np.bool_]:
        """The removals that some seed has at every step, bool (R,)."""
        return np.asarray(self._seen.all(axis=1))


def spans(of: Course, count: int) -> list[slice]:
    """The steps in at most ``count`` runs of much the same length.

    Of one evaluation example they stay together: numpy adds in another order if an array has one number in a row.
    """
    count = 1 if of.evals == 1 else max(1, min(count, len(of.steps)))
    ends = [len(of.steps) * place // count for place in range(count + 1)]
    return [slice(first, stop) for first, stop in pairwise(ends)]


def joined(of: Sequence[Reduced]) -> Reduced:
    """What shares came to, in the order of their steps."""
    if len(of) == 1:
        return of[0]
    first = of[0].reduction
    parts = [one.reduction for one in of]
    reduction = Reduction(
        effects=Welford.joined([p.effects for p in parts]),
        training_only=Welford.joined([p.training_only for p in parts]),
        centred=Welford.joined([p.centred for p in parts]),
        shift=Welford.joined([p.shift for p in parts]),
        joint=Comoment.joined([p.joint for p in parts]),
        floors=_floors([p.floors for p in parts]),
        seeds=first.seeds,
        diverged=first.diverged,
        distance=Welford.joined([p.distance for p in parts]),
        scale=first.scale,
        at_final=first.at_final,
    )
    scores = [[row for rows in alike for row in rows] for alike in zip(*(one.scores for one in of), strict=True)]
    return Reduced(reduction, scores, [row for one in of for row in one.reliability])


def _floors(of: Sequence[Floor]) -> Floor:
    one, common = (
        {adjust: np.concatenate([each[adjust] for each in every]) for adjust in every[0]}
        for every in ([f.one for f in of], [f.common for f in of])
    )
    return Floor(one, common, of[0].measured, of[0].witnesses)


def reduced(blocks: Iterable[SeedBlock], of: Course) -> Reduced:
    """What a sweep's seeds come to, in this process."""
    share, presence = Share(of), Presence(of)
    for block in blocks:
        presence.add(block)
        share.add(block)
    return share.finish(presence.everywhere)
