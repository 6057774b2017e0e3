"""Somebody else's ground truth: how reliable it is, and which differences between methods are more than its noise.

Takes any (seeds, removals, evals) array of effects, from further training, retraining or anything else that has seeds.
The figures are those of a sweep of fimo (``tables/reliability.py``, ``tables/score.py``). Pure functions over arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from fimo.orchestrator.tables import schemas as tables
from fimo.orchestrator.tables.intervals import Spread, interval
from fimo.orchestrator.tables.reduce import Reduction, SeedBlock, reduce
from fimo.orchestrator.tables.reliability import ADJUSTMENTS
from fimo.orchestrator.tables.score import METRICS, EstimateMatrix, Key, Scorer
from fimo.workers.errors import UsageError

Array = NDArray[np.float64]

DIFFERENCES = pa.schema(
    [
        ("estimator", pa.string()),
        ("other", pa.string()),
        ("metric", pa.string()),
        ("adjust", pa.string()),
        ("difference", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("noise", pa.bool_()),
    ]
)
"""Pairs of methods: the difference of their scores, its 95% interval, and whether it may be noise (0 is in it)."""


@dataclass(frozen=True)
class Audit:
    """What a ground truth says of itself and of methods.

    Attributes:
        seeds, removals, evals: of the effects.
        reliability: as ``reliability.parquet``; ``scores``: as ``scores.parquet``; step is 0 in both.
        differences: ``DIFFERENCES``.
        notes: what a reader must be told first, one line each.
    """

    seeds: int
    removals: int
    evals: int
    reliability: pa.Table
    scores: pa.Table
    differences: pa.Table
    notes: tuple[str, ...]


def audit(effects: ArrayLike, estimates: Mapping[str, ArrayLike] | None = None) -> Audit:
    """Audit a ground truth, and methods against it.

    Args:
        effects: (seeds, removals, evals): by how much leaving a removal out has changed each evaluation example's g
            with each seed, the baseline subtracted; positive = removing raises g. NaN = that run is missing.
        estimates: the methods' (removals, evals) matrices by name, of the same sign.

    Raises:
        UsageError: an array of another shape, of no numbers, or with values that are not finite.
    """
    gold = _effects(effects)
    seeds, r, m = gold.shape
    matrices = [EstimateMatrix(name, "{}", _matrix(name, values, (r, m))) for name, values in (estimates or {}).items()]
    scorer = Scorer(matrices, [0], seeds)
    blocks, reduction = reduce((_block(seed, values) for seed, values in enumerate(gold)), r, 1, m)
    for block in blocks:
        scorer.add(block, reduction.floor)
    scorer.finish(reduction)
    return Audit(
        seeds=seeds,
        removals=r,
        evals=m,
        reliability=scorer.reliability_table(),
        scores=scorer.table(),
        differences=tables.from_rows(DIFFERENCES, _differences(scorer, reduction)),
        notes=tuple(_notes(gold, scorer)),
    )


def _effects(effects: ArrayLike) -> Array:
    try:
        gold = np.asarray(effects, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError("effects must be an array of numbers (seeds, removals, evals)") from error
    if gold.ndim != 3 or 0 in gold.shape:
        raise UsageError(f"effects must be (seeds, removals, evals), three axes, got shape {gold.shape}")
    if np.isinf(gold).any():
        raise UsageError("effects hold infinite values: leave those runs out, as NaN")
    if gold.shape[1] < 2:
        raise UsageError("effects of one removal: an agreement over removals needs two at least")
    if not np.isfinite(gold).all(axis=2).any(axis=0).all():
        raise UsageError("a removal has no whole run with any seed: leave it out of the array")
    return gold


def _matrix(name: str, values: ArrayLike, shape: tuple[int, int]) -> Array:
    try:
        matrix = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"estimates '{name}' must be numbers (removals, evals)") from error
    if matrix.shape != shape:
        raise UsageError(
            f"estimates '{name}' have shape {matrix.shape}; the effects have {shape[0]} removals × {shape[1]} "
            f"evaluation examples{' (transposed?)' if matrix.shape == shape[::-1] else ''}"
        )
    if not np.isfinite(matrix).all():
        raise UsageError(f"estimates '{name}' hold values that are missing or not finite")
    return matrix


def _block(seed: int, values: Array) -> SeedBlock:
    finite = np.isfinite(values).all(axis=1, keepdims=True)
    effects = np.where(finite, values, np.nan)[:, None]
    nothing = np.zeros((1, values.shape[1]))
    return SeedBlock(seed, effects, nothing, nothing, 1, ())


def _differences(scorer: Scorer, reduction: Reduction) -> Iterator[tuple[object, ...]]:
    """Every pair of methods: seeds and evaluation examples are the same for both, so that most noise cancels."""
    names = [e.estimator for e in scorer.estimates]
    nowhere, floor = np.zeros(1, dtype=bool), np.zeros((1, reduction.floor.shape[1]))
    everything = np.ones(len(reduction.effects.mean), dtype=bool)
    whole = dict(scorer.agreements(reduction.effects.mean, floor, nowhere))
    without: list[dict[Key, Array]] = [
        dict(scorer.agreements(others, floor, nowhere)) for _, _, others, _ in scorer.groups.left_out(everything)
    ]
    for metric in METRICS:
        for adjust in ADJUSTMENTS:
            for a, b in combinations(range(len(names)), 2):
                one, other = (a, metric, adjust), (b, metric, adjust)
                values, spread = whole[one][0] - whole[other][0], Spread()
                for left in without:
                    spread.add(left[one] - left[other])
                seeds, both = spread.variances(jackknife=True)
                found = None
                if spread.count:
                    found = interval(values, float(seeds[0]), float(both[0]), spread.count, -2.0, 2.0)
                low, high = found or (None, None)
                kept = values[~np.isnan(values)]
                difference = float(kept.mean()) if len(kept) else None
                noise = None if low is None or high is None else bool(low <= 0 <= high)
                yield names[a], names[b], metric, adjust, difference, low, high, noise


def _notes(gold: Array, scorer: Scorer) -> Iterator[str]:
    if len(gold) == 1:
        yield "one seed: no reliability, no ceiling and no interval; give effects of more seeds"
    elif scorer.groups.seeds < len(gold):
        missing = len(gold) - scorer.groups.seeds
        yield f"{missing} of {len(gold)} seeds lack a removal: they count in means, but not in what is said of noise"
    if len(gold) > 1 and not (gold - gold[0]).any():
        yield "the seeds are all equal: they are no independent runs, or nothing in them was random"
