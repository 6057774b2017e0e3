"""What a sweep's objects come to, as the tables that are written; pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.tables import schemas
from fimo.orchestrator.tables.attributed import amounts_table, attribution_table, removals_table, training_only_table
from fimo.orchestrator.tables.score import EstimateMatrix
from fimo.orchestrator.tables.shares import Reduced
from fimo.orchestrator.tables.similarity import similarity_table
from fimo.workers.amounts import BASELINE, epoch_steps


def about(manifest: Manifest) -> dict[str, Any]:
    """What every table says in its metadata that it is of; ``resources`` are part of no number."""
    spec = manifest.spec.canonical()
    spec.pop("resources", None)
    return {"sweep": manifest.spec.name, "digest": manifest.digest, "spec": spec}


def tables_of(
    manifest: Manifest,
    found: Reduced,
    estimates: Sequence[EstimateMatrix],
    costs: Sequence[tuple[object, ...]],
    notes: Sequence[tuple[object, ...]],
) -> dict[str, pa.Table]:
    """Every table of ``schemas.SCHEMAS``, as it is written.

    Args:
        costs, notes: rows of ``costs`` and ``estimator_notes``.
    """
    reduction = found.reduction
    scores, reliability = found.tables()
    plain = {
        "attribution": attribution_table(reduction, manifest.removals, manifest.steps),
        "training_only": training_only_table(reduction, manifest.steps),
        "amounts": amounts_table(reduction, manifest.steps),
        "estimates": _estimates_table(estimates, manifest),
        "estimator_notes": schemas.from_rows(schemas.NOTES, notes),
        "scores": scores,
        "similarity": similarity_table(estimates),
        "reliability": reliability,
        "removals": removals_table(manifest.removals, manifest.names),
        "costs": schemas.from_rows(schemas.COSTS, costs),
    }
    per_epoch = epoch_steps(manifest.train, BASELINE, manifest.spec.further_training.settings())
    return schemas.published({name: plain[name] for name in schemas.SCHEMAS}, per_epoch, about(manifest))


def _estimates_table(estimates: Sequence[EstimateMatrix], manifest: Manifest) -> pa.Table:
    """``estimates.parquet``: rows by estimator in spec order, step, removal, eval."""
    numbers = np.array([r.number for r in manifest.removals], dtype=np.int32)
    tables: list[pa.Table] = []
    for e in estimates:
        values = e.values if e.steps is not None else e.values[None]
        s, r, m = values.shape
        steps = (
            pa.nulls(values.size, pa.int32())
            if e.steps is None
            else np.repeat(np.array(e.steps, dtype=np.int32), r * m)
        )
        tables.append(
            schemas.table(
                schemas.ESTIMATES,
                estimator=pa.repeat(e.estimator, values.size),
                params=pa.repeat(e.params, values.size),
                removal=np.tile(np.repeat(numbers, m), s),
                eval=np.tile(np.arange(m, dtype=np.int32), s * r),
                step=steps,
                value=values.reshape(-1),
            )
        )
    return pa.concat_tables(tables) if tables else schemas.ESTIMATES.empty_table()
