"""``similarity.parquet``: how much any two estimators say the same. Pure functions over values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fimo.orchestrator.tables import schemas as tables
from fimo.orchestrator.tables.agreement import cosine, mean_and_sem
from fimo.orchestrator.tables.score import EstimateMatrix

Array = NDArray[np.float64]


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
    return tables.from_rows(tables.SIMILARITY, rows)


def _at(estimate: EstimateMatrix, step: int | None) -> Array:
    if estimate.steps is None or step is None:
        return estimate.values
    values: Array = estimate.values[estimate.steps.index(step)]
    return values
