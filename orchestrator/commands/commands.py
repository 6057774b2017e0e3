"""What the commands do, as functions that return plain values; ``cli`` prints them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from fimo.orchestrator.report import show
from fimo.orchestrator.resolve.identity import source_digest
from fimo.orchestrator.run import driver as run
from fimo.orchestrator.run import gather
from fimo.orchestrator.run.plan import Plan
from fimo.orchestrator.spec.spec import Spec
from fimo.orchestrator.store import Store, open_store, split_sweep
from fimo.orchestrator.sweep import imported
from fimo.orchestrator.sweep.sweep import Listed, Manifest, Sweep
from fimo.orchestrator.tables import schemas as tables
from fimo.workers.device import deterministic, pick_device
from fimo.workers.errors import StoreError, UsageError
from fimo.workers.further_training import further_train
from fimo.workers.stacking.size import measure_stack_size
from rich.console import Console
from rich.table import Table


def open_sweep(uri: str) -> Sweep:
    """STORE/NAME as a sweep; raises UsageError."""
    store, name = split_sweep(uri)
    return Sweep(open_store(store), name)


def plan(spec: Spec, beside: Path, store: str | None, measure: bool) -> dict[str, Any]:
    """Cells, shards and bytes; with ``measure`` also seconds, from a few timed steps of one stack."""
    resolved = run.resolve(spec, beside)
    manifest = resolved.manifest
    sweep = None if store is None else Sweep(open_store(store), spec.name)
    planned = run.current_plan(manifest, sweep)
    found: dict[str, Any] = {
        "name": spec.name,
        "digest": manifest.digest,
        "cells": planned.cells,
        "done": planned.done,
        "shards": len(planned.shards),
        "removals": len(manifest.removals),
        "seeds": spec.seeds.count,
        "evals": manifest.evals,
        "train": manifest.train,
        "scalars": manifest.scalars,
        "steps": manifest.steps[-1],
        "amounts": len(manifest.steps),
        "bytes": planned.part_bytes,
        "removal_mode": spec.further_training.removal_mode,
        "estimators": [show.label(*e) for e in manifest.estimators],
    }
    if measure:
        found |= _measured(resolved, planned)
    return found


def _measured(resolved: run.Resolved, planned: Plan) -> dict[str, Any]:
    """Time a stack over a few steps and an evaluation, and reckon the sweep from it."""
    device = pick_device(resolved.spec.resources.gpus)
    resources, manifest = resolved.spec.resources, resolved.manifest
    torch.set_num_threads(max(1, int(resources.cpus)))
    with deterministic(device):
        start = resolved.prepared.start(device)
        cells = min(run.size_of_shards(manifest) + 1, len(manifest.removals) + 1)
        size, seconds = measure_stack_size(start, cells)
        if resources.replicas != "auto":
            size = min(resources.replicas, cells)
        lanes = [r.indices for r in manifest.removals[: size - 1]]
        started = time.perf_counter()
        further_train(start, [(), *lanes], 0, last=manifest.steps[0])
        first = time.perf_counter() - started
    per_step = seconds.get(size, min(seconds.values()))
    evaluation = max(0.0, first / (1 + len(lanes)) - per_step * manifest.steps[0])
    cell = per_step * manifest.steps[-1] + evaluation * len(manifest.steps)
    # Every shard also trains its baseline and the second baseline of the noise floor.
    total = cell * (planned.missing + 2 * len(planned.shards))
    return {
        "replicas": size,
        "seconds_per_step": per_step,
        "seconds_per_cell": cell,
        "device_hours": total / 3600,
        "device": device.type,
    }


def resume(uri: str) -> tuple[Store, run.Resolved]:
    """A sweep's store and its spec resolved again.

    Raises:
        UsageError: the workload's code is not where the spec was, or is not what it was.
    """
    sweep = open_sweep(uri)
    manifest = sweep.read_manifest()
    for beside in (Path(manifest.beside), Path.cwd()):
        # Held against the recorded digest before anything of it is imported: a store must not choose what code runs.
        if beside.is_dir() and source_digest(manifest.spec.workload, beside) == manifest.source:
            return sweep.store, run.resolve(manifest.spec, beside)
    raise UsageError(
        f"the code of workload {manifest.spec.workload} is neither in {manifest.beside} nor here as it was when the "
        "sweep was started; go to its folder, or start the spec again with `fimo run`"
    )


def status(uri: str) -> dict[str, Any]:
    """Cells done, failed and missing by seed, pace and estimated finish, from the store alone."""
    sweep = open_sweep(uri)
    manifest = sweep.read_manifest()
    listed = sweep.list_parts(manifest.digest)
    done = sweep.done(manifest.digest, listed)
    wanted = [r.indices for r in manifest.removals]
    by_seed = {seed: sum(i in done.get(seed, set()) for i in wanted) for seed in manifest.spec.seeds}
    aside = run.failures(sweep)
    finished, cells = sum(by_seed.values()), len(wanted) * manifest.spec.seeds.count
    owed = run.missing_estimates(manifest, sweep)
    complete = finished == cells and not owed
    found: dict[str, Any] = {
        "sweep": sweep.uri,
        "cells": cells,
        "done": finished,
        "missing": cells - finished,
        "seeds": manifest.spec.seeds.count,
        "seeds_complete": sum(n == len(wanted) for n in by_seed.values()),
        "seeds_begun": sum(0 < n < len(wanted) for n in by_seed.values()),
        "by_seed": {str(seed): n for seed, n in by_seed.items()},
        "removals": len(wanted),
        "parts": len(listed),
        "part_bytes": sum(p.size for p in listed),
        "estimators": len(manifest.estimators),
        "estimates_missing": sorted({t.estimator for t in owed}),
        "failed": [line for _, line in aside],
        "complete": complete,
        "exit_code": 1 if aside else 0 if complete else 3,
    }
    return found | _pace(listed, finished, cells)


def _pace(listed: list[Listed], done: int, cells: int) -> dict[str, Any]:
    """Parts a minute over the last ten minutes of commits, and when the rest would be done at that pace."""
    if not listed:
        return {"last_commit_age_s": None, "parts_per_minute": None, "finish_in_s": None}
    times = sorted(p.modified for p in listed)
    age = (datetime.now(UTC) - times[-1]).total_seconds()
    recent = [t for t in times if (times[-1] - t).total_seconds() <= 600]
    span = (recent[-1] - recent[0]).total_seconds()
    pace = 60 * (len(recent) - 1) / span if span > 0 else None
    per_part = done / len(listed)
    finish = (cells - done) / per_part / pace * 60 if pace and per_part and cells > done else None
    return {"last_commit_age_s": age, "parts_per_minute": pace, "finish_in_s": finish}


def pull(uri: str, to: Path, form: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Write a sweep's tables to a folder; reduces where the store's tables are older than its parts."""
    if form not in ("parquet", "csv"):
        raise UsageError(f"--format is parquet or csv, not '{form}'")
    sweep = open_sweep(uri)
    manifest = sweep.read_manifest()
    found = _stored_tables(sweep, manifest)
    complete = True
    if found is None:
        gathered = gather.gather(sweep, manifest, say)
        for _, why in gathered.bad:
            say(f"{why}; left out (`fimo resume {sweep.uri}` computes it again)")
        found, complete = gathered.tables, gathered.complete
    else:
        complete = _all_there(sweep, manifest)
    written = {}
    try:
        to.mkdir(parents=True, exist_ok=True)
        for name, table in found.items():
            data = tables.encode_table(table) if form == "parquet" else tables.encode_csv(table)
            path = to / f"{name}.{form}"
            path.write_bytes(data)
            written[name] = str(path)
    except OSError as error:
        raise StoreError(f"cannot write to {to}: {error.strerror or error}") from error
    if not complete:
        say(f"the sweep is incomplete: these tables hold what is there; `fimo resume {sweep.uri}` computes the rest")
    return {"tables": written, "complete": complete, "exit_code": 0 if complete else 3}


@dataclass(frozen=True)
class Imported:
    """What an import came to: plain values, and the score table where there is something to score against."""

    json: dict[str, Any]
    table: Table | None


def import_scores(file: Path, uri: str, name: str, negate: bool) -> Imported:
    """Take another library's matrix into a sweep and score it."""
    sweep = open_sweep(uri)
    manifest = sweep.read_manifest()
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(f"'{file}' cannot be read: {error.strerror or error}") from error
    imported.import_scores(sweep, manifest, data, str(file), name, negate)
    found = gather.gather(sweep, manifest)
    written = gather.write_tables(sweep, found)
    scores = [r for r in found.tables["scores"].to_pylist() if r["estimator"] == name]
    values = {"sweep": sweep.uri, "name": name, "negated": negate, "tables": written, "scores": scores}
    return Imported(values, show.score_table(found.tables["scores"], found.tables["costs"]))


def _all_there(sweep: Sweep, manifest: Manifest) -> bool:
    return not run.current_plan(manifest, sweep).missing and not run.missing_estimates(manifest, sweep)


def _stored_tables(sweep: Sweep, manifest: Manifest) -> dict[str, Any] | None:
    """The store's own tables where they were made from what it holds now."""
    try:
        made_from = json.loads(sweep.store.get(f"{sweep.name}/tables/made-from.json"))["stamp"]
        if made_from != gather.stamp(sweep, manifest):
            return None
        return {
            name: tables.decode_table(sweep.store.get(f"{sweep.name}/tables/{name}.parquet"), name)
            for name in tables.SCHEMAS
        }
    except (StoreError, ValueError, KeyError, TypeError, RecursionError):
        return None


# -- how a run ended ----------------------------------------------------------------------------------------------


def report_json(manifest: Manifest, store: Store, report: run.Report) -> dict[str, Any]:
    """A run's end as plain values."""
    scores = report.found.tables["scores"].to_pylist()
    seeds = max((r["seeds"] for r in scores), default=0)
    return {
        "sweep": Sweep(store, manifest.spec.name).uri,
        "cells": report.found.cells,
        "done": report.found.done,
        "computed": sum(r.cells for r in report.outcome.receipts),
        "complete": report.complete,
        "diverged": len(report.found.diverged),
        "failed": [line for _, line in report.aside],
        "stopped": report.outcome.stopped,
        "tables": report.written,
        "scores": [r for r in scores if r["seeds"] == seeds],
        "exit_code": report.exit_code,
    }


def print_report(console: Console, report: run.Report) -> None:
    """The score table and where the tables are."""
    table = show.score_table(report.found.tables["scores"], report.found.tables["costs"])
    if table is not None:
        console.print(table)
    for path in report.written.values():
        console.print(path, highlight=False, markup=False, soft_wrap=True)


def complaints(manifest: Manifest, store: Store, report: run.Report) -> Iterator[str]:
    """One line for each thing that a reader of the tables must know."""
    uri = Sweep(store, manifest.spec.name).uri
    found, outcome = report.found, report.outcome
    if outcome.broken:
        yield f"fimo: stopped: {outcome.stopped}"
    elif outcome.stopped:
        yield f"fimo: {outcome.stopped}; `fimo resume {uri}` goes on"
    for _, line in report.aside[:3]:
        yield f"fimo: set aside: {line}"
    if len(report.aside) > 3:
        yield f"fimo: and {len(report.aside) - 3} more set aside"
    if report.aside:
        yield f"fimo: the traceback is under {uri}/failed; `fimo resume {uri} --retry-failed` tries again"
    if found.diverged:
        number, seed, step = found.diverged[0]
        who = "the baseline" if number < 0 else f"removal {number}"
        yield (
            f"fimo: {len(found.diverged)} results are not finite and were left out, the first: {who}, seed {seed}, "
            f"step {step}; lower the learning rate or clip"
        )
    if len(found.devices) > 1:
        yield f"fimo: parts come from several devices ({', '.join(found.devices)}): differences between them are noise"
    if not report.complete and not outcome.broken:
        owed = found.cells - found.done
        lacking = found.estimators_wanted - found.estimators_done
        yield f"fimo: incomplete: {owed} cells and {lacking} estimators are missing; `fimo resume {uri}` computes them"
