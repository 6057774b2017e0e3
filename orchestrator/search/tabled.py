"""What a search has found, as the tables that are written."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pyarrow as pa

from fimo.estimators.amounts import linear
from fimo.estimators.matching import effective_rates
from fimo.orchestrator.run.tabled import about
from fimo.orchestrator.search.estimators import Found
from fimo.orchestrator.search.points import damping_of
from fimo.orchestrator.search.training import FoundTraining
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.tables import schemas
from fimo.workers.amounts import BASELINE, epoch_steps


def matched_dampings(manifest: Manifest, steps: Sequence[int]) -> list[float | None]:
    """λ_t = 1/τ_t of each step, which is 1/(ηt) under plain SGD; None where a damping is not in the optimizer's scale.

    That is under Adam, whose matched damping is of another matrix, and under clipping, whose factor is not known here.
    """
    settings = manifest.spec.further_training.settings()
    if not linear(settings.optimizer) or settings.clip_norm is not None:
        return [None for _ in steps]
    return [1 / rate for rate in effective_rates(settings.optimizer, steps)]


def search_table(found: Found, manifest: Manifest) -> pa.Table:
    """``search.parquet``: rows by point in spec order, then step; a point that failed has none."""
    matched = dict(zip(found.steps, matched_dampings(manifest, found.steps), strict=True))
    per_epoch = epoch_steps(manifest.train, BASELINE, manifest.spec.further_training.settings())
    rows: list[tuple[object, ...]] = []
    for place, one in enumerate(found.tried):
        damping = next(damping_of(json.loads(one.point.params)), None)
        for row in one.rows:
            rows.append(
                (
                    one.point.estimator,
                    one.point.params,
                    damping,
                    row.step,
                    row.step / per_epoch,
                    matched[row.step],
                    row.searched,
                    row.searched_evals,
                    row.score,
                    row.sem,
                    row.low,
                    row.high,
                    row.ceiling,
                    row.score / row.ceiling if row.score is not None and row.ceiling else None,
                    row.evals,
                    row.undefined,
                    found.best.get(row.step) == place,
                    found.overall == place,
                    one.seconds,
                    one.device,
                )
            )
    told = {**about(manifest), "metric": found.metric, "points": found.points}
    return schemas.from_rows(schemas.SEARCH, rows).replace_schema_metadata(schemas.metadata("search", told))


def training_table(found: FoundTraining, manifest: Manifest) -> pa.Table:
    """``search_training.parquet``: rows by candidate in spec order, at its last rung, then step."""
    per_epoch = epoch_steps(manifest.train, BASELINE, manifest.spec.further_training.settings())
    rows: list[tuple[object, ...]] = []
    for place, rung in enumerate(found.last):
        one = rung.candidate
        for row in rung.rows:
            rows.append(
                (
                    one.optimizer,
                    one.lr,
                    one.removal_mode,
                    row.step,
                    row.step / per_epoch,
                    rung.seeds,
                    row.reliability,
                    row.seconds,
                    row.per_second(rung.seeds),
                    row.distance,
                    row.relative,
                    row.under_floor,
                    row.fault,
                    rung.stopped,
                    found.winner == (place, row.step),
                    rung.device,
                )
            )
    told = {**about(manifest), "candidates": found.candidates}
    metadata = schemas.metadata("search_training", told)
    return schemas.from_rows(schemas.SEARCH_TRAINING, rows).replace_schema_metadata(metadata)
