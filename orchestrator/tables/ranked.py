"""``ranking.parquet``, an evaluation example after another, so that no more than one of them is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fimo.orchestrator.tables import schemas
from fimo.orchestrator.tables.ranking import order

Array = NDArray[np.float64]


def ranked_table(
    place: int,
    estimate: Array,
    effect: Array,
    low: Array,
    high: Array,
    verified: Array,
    sem: Array,
    seeds: Array,
    names: Mapping[str, Sequence[str]],
) -> pa.Table:
    """One evaluation example's rows, by rank: by the verified effect where there is one, else by the calibrated one.

    ``p`` is the two-sided t-test of no effect over seeds, of the verified.

    Args:
        names: ``ids`` and ``labels`` of all n training examples, those of the two that the workload has.
    """
    by = order(np.where(np.isnan(verified), effect, verified))
    n = len(by)
    return schemas.table(
        schemas.RANKING,
        eval=np.full(n, place, dtype=np.int32),
        index=by.astype(np.int32),
        estimate=estimate[by],
        effect=effect[by],
        low=_finite(low)[by],
        high=_finite(high)[by],
        verified=verified[by],
        sem=sem[by],
        p=_p_values(verified, sem, seeds)[by],
        rank=np.arange(1, n + 1, dtype=np.int32),
        **{
            column: [names[kind][i] for i in by] if kind in names else [None] * n
            for column, kind in (("id", "ids"), ("label", "labels"))
        },
    )


def _finite(values: Array) -> Array:
    return np.where(np.isfinite(values), values, np.nan)


def _p_values(mean: Array, sem: Array, seeds: Array) -> Array:
    from scipy.special import stdtr  # slow to import; see ``agreement.ranks``

    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(mean) / sem
        p = np.where(np.isnan(t) & (mean == 0), 1.0, 2 * stdtr(seeds - 1, -t))
    return np.where(np.isnan(sem), np.nan, p)


def write(tables: Iterator[pa.Table], to: Path, about: Mapping[str, Any]) -> None:
    """Write tables as row groups of one file; ``about`` goes to its metadata, as in every table."""
    schema = schemas.RANKING.with_metadata(schemas.metadata("ranking", about))
    with pq.ParquetWriter(to, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)
