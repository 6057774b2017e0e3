"""The tables of a reduction: attribution, training-only effect, amounts, removals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.tables import schemas as tables
from fimo.orchestrator.tables.reduce import Reduction
from fimo.orchestrator.tables.significance import p_values


def attribution_table(reduction: Reduction, removals: Sequence[NamedRemoval], steps: Sequence[int]) -> pa.Table:
    """``attribution.parquet``: rows by removal, eval, step; cells without any finite seed have no row."""
    moments = reduction.effects
    r, t, m = moments.mean.shape
    counts = np.broadcast_to(moments.count[..., None], (r, t, m))
    keep = np.moveaxis(counts, 2, 1).reshape(-1) > 0

    def column(values: NDArray[np.generic]) -> NDArray[np.generic]:
        return np.moveaxis(np.broadcast_to(values, (r, t, m)), 2, 1).reshape(-1)[keep]

    return tables.table(
        tables.ATTRIBUTION,
        removal=column(np.array([x.number for x in removals], dtype=np.int32)[:, None, None]),
        eval=column(np.arange(m, dtype=np.int32)),
        step=column(np.array(steps, dtype=np.int32)[:, None]),
        effect=column(moments.mean),
        sem=column(sem := moments.sem()),
        p=column(p_values(moments.mean, sem, counts)),
        seeds=column(counts.astype(np.int32)),
        spread=column(reduction.joint.spread(moments)),
        under_floor=column(np.abs(moments.mean) <= reduction.floors.of_mean(len(reduction.seeds))),
    )


def training_only_table(reduction: Reduction, steps: Sequence[int]) -> pa.Table:
    """``training_only.parquet``: the baseline's mean delta, rows by eval, step."""
    moments = reduction.training_only
    _, t, m = moments.mean.shape
    counts = np.broadcast_to(moments.count[0][:, None], (t, m))
    keep = counts.T.reshape(-1) > 0
    return tables.table(
        tables.TRAINING_ONLY,
        eval=np.repeat(np.arange(m, dtype=np.int32), t)[keep],
        step=np.tile(np.array(steps, dtype=np.int32), m)[keep],
        delta=moments.mean[0].T.reshape(-1)[keep],
        sem=moments.sem()[0].T.reshape(-1)[keep],
        seeds=counts.T.reshape(-1).astype(np.int32)[keep],
        at_final=np.repeat(np.full(m, np.nan) if reduction.at_final is None else reduction.at_final, t)[keep],
    )


def amounts_table(reduction: Reduction, steps: Sequence[int]) -> pa.Table:
    """``amounts.parquet``: how far training on everything moves the parameters, ‖Δθ_t‖ over seeds, by step."""
    moments = reduction.distance
    counts = moments.count[0]
    keep = counts > 0
    return tables.table(
        tables.AMOUNTS,
        step=np.array(steps, dtype=np.int32)[keep],
        distance=moments.mean[0, :, 0][keep],
        sem=moments.sem()[0, :, 0][keep],
        seeds=counts.astype(np.int32)[keep],
    )


def removals_table(
    removals: Sequence[NamedRemoval], names: Sequence[tuple[int, str | None, str | None]] = ()
) -> pa.Table:
    """``removals.parquet``: which training indices each removal leaves out.

    Args:
        names: (training index, id, label) of the removed examples, as the workload has them.
    """
    texts = [{index: of[kind] for index, *of in names} for kind in (0, 1)]

    def told(kind: int) -> list[list[str | None] | None]:
        known = texts[kind]
        if not any(text is not None for text in known.values()):
            return [None] * len(removals)
        return [[known.get(index) for index in r.indices] for r in removals]

    return pa.table(
        {
            "removal": pa.array([r.number for r in removals], pa.int32()),
            "name": pa.array([r.name for r in removals], pa.string()),
            "indices": pa.array([list(r.indices) for r in removals], pa.list_(pa.int32())),
            "ids": pa.array(told(0), pa.list_(pa.string())),
            "labels": pa.array(told(1), pa.list_(pa.string())),
        },
        schema=tables.REMOVALS,
    )
