"""Estimates scored on two halves of the evaluation examples: one to choose by, one to report on.

The best of many points is best partly by luck: on the examples that it was chosen by, its score is too high. So a point
is chosen by its score on the *searched* half, and the score that is reported is that on the *held-out* half, which has
no say in the choice. What carries over is luck that both halves share: that of the seeds that the attribution averages,
and of the removals.

The score of a half is that of ``score.py`` with the other half's evaluation examples left out: the mean over examples
of the agreement over removals with the attribution of all seeds (adjust baseline), undefined examples counted. Pure
functions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fimo.orchestrator.tables.agreement import mean_and_sem
from fimo.orchestrator.tables.intervals import Spread, interval
from fimo.orchestrator.tables.reduce import Reduction
from fimo.orchestrator.tables.score import EstimateMatrix, Scorer, rows_of

Array = NDArray[np.float64]
Places = NDArray[np.int64]
SPLIT_SEED = 0
"""Of the permutation whose even places are searched and whose odd places are held out."""


def split(m: int, seed: int = SPLIT_SEED) -> tuple[Places, Places]:
    """(searched, held out) of m evaluation examples, ascending; disjoint, together all, the first the larger by one.

    By hashes, so that it is one split on every machine and in every version of numpy.
    """
    order = sorted(range(m), key=lambda place: hashlib.sha256(f"{seed}:{place}".encode()).digest())
    searched, held = sorted(order[0::2]), sorted(order[1::2])
    return np.array(searched, dtype=np.int64), np.array(held, dtype=np.int64)


@dataclass(frozen=True)
class Gold:
    """The attribution that estimates are scored against, R' removals × T steps × m evaluation examples.

    Attributes:
        keep: which of the sweep's removals are among the R', bool (R,).
        effects: the mean over all seeds, float64 (R', T, m).
        floor: its noise floor, (T, m); ``exploded``: bool (T,).
        ceilings: of the metric, (T, m); None if there are none.
        without_one: the mean without each group of seeds, for intervals.
    """

    metric: str
    steps: tuple[int, ...]
    keep: NDArray[np.bool_]
    effects: Array
    floor: Array
    exploded: NDArray[np.bool_]
    ceilings: Array | None
    without_one: tuple[Array, ...]


def gold_of(reduction: Reduction, scorer: Scorer, steps: Sequence[int], wanted: Sequence[int], metric: str) -> Gold:
    """The gold standard at the ``wanted`` of the sweep's ``steps``.

    Args:
        reduction, scorer: of the sweep's blocks, finished; the scorer may be one without estimates.
    """
    places = [steps.index(step) for step in wanted]
    keep = np.asarray((reduction.effects.count > 0).all(axis=1))
    seeds = len(reduction.seeds)
    ceilings = None if scorer.reliability is None else scorer.reliability.ceilings(metric, "baseline", seeds)
    return Gold(
        metric=metric,
        steps=tuple(wanted),
        keep=keep,
        effects=reduction.effects.mean[keep][:, places],
        floor=reduction.floors.of_mean(seeds)[places],
        exploded=reduction.exploded[places],
        ceilings=None if ceilings is None else ceilings[places],
        without_one=tuple(others[:, places] for _, _, others, _ in scorer.groups.left_out(keep)),
    )


@dataclass(frozen=True)
class HalfScore:
    """A point's scores at a step; None where nothing is defined.

    Attributes:
        searched: on the half that is chosen by, the mean over ``searched_evals`` examples.
        score: on the other, over ``evals``; ``undefined`` others of that half say nothing.
        low, high: its 95% interval; ``ceiling``: what a perfect estimate would reach there.
    """

    step: int
    searched: float | None
    searched_evals: int
    score: float | None
    sem: float | None
    low: float | None
    high: float | None
    ceiling: float | None
    evals: int
    undefined: int


def half_scores(gold: Gold, estimate: EstimateMatrix, halves: tuple[Places, Places] | None = None) -> list[HalfScore]:
    """An estimate's scores on both halves, at each step of ``gold`` that it is of.

    Args:
        estimate: of all removals of the sweep.
        halves: default: ``split``.
    """
    searched, held = halves or split(gold.effects.shape[2])
    kept = rows_of(estimate, gold.keep)
    scorer, places = Scorer([kept], gold.steps, 0), kept.against(gold.steps)[0]
    agreement = _agreement(scorer, gold, gold.effects, gold.floor, gold.exploded)
    spread, nothing = Spread(), (np.zeros_like(gold.floor), np.zeros_like(gold.exploded))
    for others in gold.without_one:
        other = _agreement(scorer, gold, others, *nothing)
        spread.add(np.where(np.isnan(agreement), np.nan, other)[:, held])
    seeds, both = spread.variances(jackknife=True) if spread.count else (np.full(len(places), np.nan),) * 2
    return [
        _row(gold, place, agreement[row], (searched, held), (float(seeds[row]), float(both[row]), spread.count))
        for row, place in enumerate(places)
    ]


def _agreement(scorer: Scorer, gold: Gold, effects: Array, floor: Array, exploded: NDArray[np.bool_]) -> Array:
    """Of every evaluation example, (T', m), NaN where undefined."""
    found = dict(scorer.agreements(effects, floor, exploded))
    return found[0, gold.metric, "baseline"]


def _row(
    gold: Gold, place: int, agreement: Array, halves: tuple[Places, Places], spread: tuple[float, float, int]
) -> HalfScore:
    searched, held = halves
    chosen_by, _, chosen_evals = mean_and_sem(agreement[searched])
    values = agreement[held]
    score, sem, evals = mean_and_sem(values)
    low, high = interval(values, *spread) or (None, None)
    ceiling = None
    if gold.ceilings is not None and evals:
        ceiling = float(gold.ceilings[place][held][~np.isnan(values)].mean())
    undefined = len(values) - evals
    return HalfScore(gold.steps[place], chosen_by, chosen_evals, score, sem, low, high, ceiling, evals, undefined)


# -- the choice: nothing of the held-out half is looked at -----------------------------------------------------------


def best_at(points: Sequence[Sequence[HalfScore]], step: int) -> int | None:
    """Which point has the highest score on the searched half at a step, the first of equals; None if none has any."""
    found = [
        (row.searched, -place)
        for place, rows in enumerate(points)
        for row in rows
        if row.step == step and row.searched is not None
    ]
    return -max(found)[1] if found else None


def best_over(points: Sequence[Sequence[HalfScore]]) -> int | None:
    """Which point has the highest mean over steps of its scores on the searched half, the first of equals.

    Over the steps at which any point has one; a point that lacks one of them is passed over.
    """
    by_step = [{row.step: row.searched for row in rows if row.searched is not None} for rows in points]
    every = {step for scores in by_step for step in scores}
    found = [
        (float(np.mean([scores[step] for step in sorted(every)])), -place)
        for place, scores in enumerate(by_step)
        if every and scores.keys() >= every
    ]
    return -max(found)[1] if found else None
