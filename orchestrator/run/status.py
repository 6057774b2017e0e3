"""How far a sweep is, from its store alone: no cluster, no workload."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from fimo.orchestrator.run import failures
from fimo.orchestrator.run.heartbeat import drivers
from fimo.orchestrator.run.owed import missing_estimates, missing_witnesses, owed_tasks
from fimo.orchestrator.run.written import current, read_table, warnings_in
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Listed, Sweep
from fimo.workers.errors import StoreError

RECENT_S = 600.0
"""The pace is that of the last ten minutes of commits."""


def sweep_status(sweep: Sweep) -> dict[str, Any]:
    """Cells done and missing by seed, tasks set aside, pace and estimated finish, as plain values.

    ``resumable``: whether a resume would compute anything. ``estimated_only``: all estimates are there and no cell is
    begun, as `fimo estimate` leaves a sweep. ``exit_code``: 0 complete, 1 tasks are set aside, 3
    incomplete.

    Raises:
        UsageError: there is no such sweep.
        StoreError: the store cannot be read.
    """
    manifest = sweep.read_manifest()
    recorded = failures.read(sweep, manifest)
    listed = sweep.list_parts(manifest.digest)
    done = sweep.done(manifest, listed)
    wanted = [r.indices for r in manifest.removals]
    by_seed = {seed: sum(i in done.get(seed, set()) for i in wanted) for seed in manifest.spec.seeds}
    finished = sum(by_seed.values())
    missing = missing_estimates(manifest, sweep, recorded)
    witnesses = missing_witnesses(manifest, sweep, recorded)
    complete = manifest.settled and finished == manifest.cells and not missing and not witnesses
    status: dict[str, Any] = {
        "sweep": sweep.uri,
        "cells": manifest.cells,
        "done": finished,
        "missing": manifest.cells - finished,
        "seeds": manifest.spec.seeds.count,
        "seeds_complete": sum(n == len(wanted) for n in by_seed.values()),
        "seeds_begun": sum(0 < n < len(wanted) for n in by_seed.values()),
        "by_seed": {str(seed): n for seed, n in by_seed.items()},
        "removals": len(wanted),
        "parts": len(listed),
        "parts_of_others": 0 if listed else sum(1 for _ in sweep.store.list(keys.all_parts(sweep.name))),
        "part_bytes": sum(p.size for p in listed),
        "estimators": len(manifest.estimators),
        "estimates_missing": sorted({task.estimator for task in missing}),
        "witnesses_missing": sum(len(task.removals) for task in witnesses),
        "witnesses_left_out": {str(seed): why for seed, why in recorded.witnesses.items()},
        "left_out": {name: why for (name, _), why in recorded.left_out.items()},
        "proofs": sweep.proofs(manifest.digest),
        "drivers": drivers(sweep),
        "failed": [failure.line for failure in recorded.aside],
        "complete": complete,
        "estimated_only": bool(manifest.estimators) and not (listed or missing or recorded.aside or complete),
        "resumable": not complete and (not manifest.settled or bool(owed_tasks(manifest, sweep, recorded, done)[0])),
        "exit_code": 1 if recorded.aside else 0 if complete else 3,
        **_told(sweep, manifest, listed),
    }
    return status | _pace(listed, finished, manifest.cells)


def _told(sweep: Sweep, manifest: Manifest, listed: Sequence[Listed]) -> dict[str, Any]:
    """What the tables say of themselves; nothing while they are not of what the store holds."""
    made = current(sweep, manifest, listed)
    if made is None:
        return {"warnings": [], "reliability": []}
    try:
        rows = read_table(sweep, "reliability", made).to_pylist()
    except StoreError:
        rows = []
    return {"warnings": warnings_in(made), "reliability": [r for r in rows if r["measured"]]}


def _pace(listed: Sequence[Listed], done: int, cells: int) -> dict[str, float | None]:
    """Seconds since the last commit, parts a minute, and seconds until the rest is done at that pace."""
    if not listed:
        return {"last_commit_age_s": None, "parts_per_minute": None, "finish_in_s": None}
    times = sorted(p.modified for p in listed)
    age = (datetime.now(UTC) - times[-1]).total_seconds()
    recent = [t for t in times if (times[-1] - t).total_seconds() <= RECENT_S]
    span = (recent[-1] - recent[0]).total_seconds()
    pace = 60 * (len(recent) - 1) / span if span > 0 else None
    per_part = done / len(listed)
    finish = (cells - done) / per_part / pace * 60 if pace and per_part and cells > done else None
    return {"last_commit_age_s": age, "parts_per_minute": pace, "finish_in_s": finish}
