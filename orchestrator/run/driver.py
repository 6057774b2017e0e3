"""Running a sweep: resolve the spec, compute what is missing and no more, reduce, score.

Everything that a run knows is in the store when it ends, however it ends; a run on an interrupted or finished sweep
subtracts what is there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, zip_longest
from pathlib import Path

import torch
from fimo.orchestrator.resolve.identity import canonical, digest
from fimo.orchestrator.resolve.prepare import Prepared, prepare, read_beside, resolve_removals
from fimo.orchestrator.run import gather
from fimo.orchestrator.run.estimating import estimate_identity
from fimo.orchestrator.run.plan import Plan, Shard, make_plan, shard_size
from fimo.orchestrator.run.pool import on_ray
from fimo.orchestrator.run.schedule import Outcome, Pool, Result, SetAside, drive
from fimo.orchestrator.run.tasks import Context, EstimateTask, Task, task_name
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.spec.spec import Resources, Spec
from fimo.orchestrator.store import NotFound, Store
from fimo.orchestrator.sweep import estimates as estimate_parts
from fimo.orchestrator.sweep.parts import BadPartError, set_hash
from fimo.orchestrator.sweep.sweep import Manifest, Sweep
from fimo.workers.batches import steps_recorded
from fimo.workers.errors import StoreError, UsageError

from fimo import estimators

Where = Callable[[Context, bytes | None, Resources], AbstractContextManager[Pool]]
"""A place to run tasks: an embedded Ray, a cluster, or this process."""
EVAL_BLOCK = 128
"""Evaluation examples in one block of estimates."""
ROUNDS = 3
"""Times that parts which do not verify are computed again before the run gives up."""


@dataclass(frozen=True)
class Resolved:
    """A spec held against its workload: everything known before anything is computed."""

    spec: Spec
    beside: Path
    final_model: bytes | None
    prepared: Prepared
    manifest: Manifest


def resolve(spec: Spec, beside: Path) -> Resolved:
    """Load the workload and resolve removals, estimators and digests.

    Raises:
        UsageError, WorkloadError: in one line, before anything is written.
    """
    found = [e for entry in spec.estimators or () for e in estimators.parse(entry)]
    final_model = None if spec.final_model is None else read_beside(spec.final_model, beside)
    prepared = prepare(spec, beside, final_model)
    removals = resolve_removals(prepared, beside)
    model = prepared.model(torch.device("cpu"))
    if spec.estimators is None:
        train, evals = prepared.examples(torch.device("cpu"))
        settings, left_out = spec.further_training.settings(), [r.indices for r in removals]
        found = estimators.defaults(estimators.Problem(model, train, evals, left_out, settings, list(spec.seeds)))
    named = [(e.name, canonical(e.params())) for e in found]
    repeated = {n for n in named if named.count(n) > 1}
    if repeated:
        name, params = min(repeated)
        raise UsageError(f"estimator {name} {params} is given twice")
    training = spec.further_training.settings()
    manifest = Manifest(
        spec=spec,
        beside=str(beside),
        source=prepared.source,
        digest=prepared.digest,
        estimate_digest=prepared.estimate_digest,
        train=prepared.train,
        evals=prepared.evals,
        scalars=sum(p.numel() for p in model.params.values()),
        steps=tuple(steps_recorded(prepared.train, training)),
        removals=tuple(removals),
        estimators=tuple(named),
    )
    return Resolved(spec, beside, final_model, prepared, manifest)


def size_of_shards(manifest: Manifest) -> int:
    """Removals in one part: as the spec says, or by the cost of a cell."""
    asked = manifest.spec.resources.shard
    return shard_size(manifest.scalars, manifest.steps[-1]) if asked == "auto" else asked


def current_plan(manifest: Manifest, sweep: Sweep | None) -> Plan:
    """The plan against what the store holds (against nothing where there is no store)."""
    done = sweep.done(manifest.digest, sweep.list_parts(manifest.digest)) if sweep is not None else {}
    return make_plan(
        manifest.removals,
        manifest.spec.seeds,
        done,
        manifest.spec.further_training.settings(),
        manifest.train,
        manifest.evals,
        size_of_shards(manifest),
    )


def missing_estimates(manifest: Manifest, sweep: Sweep) -> list[EstimateTask]:
    """One task for each estimator and block of evaluation examples that some removals still lack."""
    tasks: list[EstimateTask] = []
    for estimator, params in manifest.estimators:
        found = estimate_identity(manifest.digest, manifest.estimate_digest, manifest.spec, estimator, params)
        folder = estimate_parts.folder(sweep.name, found, estimator, params)
        have: dict[tuple[int, int], set[tuple[int, ...]]] = {}
        for entry in sweep.store.list(folder):
            match = _BLOCK.fullmatch(entry.key.removeprefix(folder))
            if match:
                block = have.setdefault((int(match[2]), int(match[3])), set())
                block.update(r.indices for r in _removals_of(sweep, manifest, entry.key, match[1]))
        for first in range(0, manifest.evals, EVAL_BLOCK):
            count = min(EVAL_BLOCK, manifest.evals - first)
            owed = tuple(r for r in manifest.removals if r.indices not in have.get((first, count), set()))
            if owed:
                tasks.append(EstimateTask(estimator, params, owed, first, count))
    return tasks


_BLOCK = re.compile(r"([0-9a-f]{16})-(\d{8})-(\d{8})\.parquet")


def _removals_of(sweep: Sweep, manifest: Manifest, key: str, name: str) -> Sequence[NamedRemoval]:
    """The removals of a block of estimates; one whose set cannot be told is read for it."""
    try:
        return sweep.read_set(manifest.digest, name)
    except StoreError:
        try:
            return estimate_parts.decode_block(sweep.store.get(key), key).removals
        except BadPartError:
            return ()


@dataclass(frozen=True)
class Report:
    """How a run ended: the tables, and what went wrong."""

    found: gather.Gathered
    written: dict[str, str]
    outcome: Outcome
    aside: list[tuple[str, str]]
    shards: bool = True

    @property
    def complete(self) -> bool:
        """Whether all that was asked for is there."""
        return self.found.complete if self.shards else self.found.estimated

    @property
    def exit_code(self) -> int:
        """0 complete, 1 failed, 3 incomplete."""
        if self.aside or self.outcome.set_aside or self.found.diverged or self.outcome.broken:
            return 1
        return 0 if self.complete else 3


@dataclass(frozen=True)
class Listener:
    """Who is told of progress: the tasks owed, each result, and lines of talk."""

    start: Callable[[Plan, int], None]
    result: Callable[[Task, Result], None]
    say: Callable[[str], None]


def run(
    resolved: Resolved,
    store: Store,
    listener: Listener,
    should_stop: Callable[[], str | None] = lambda: None,
    where: Where | None = None,
    retry_failed: bool = False,
    shards: bool = True,
) -> Report:
    """Compute what is missing of a sweep, then reduce and score.

    Args:
        where: the pool that tasks run in; default: an embedded Ray.
        shards: False computes the estimates alone.

    Raises:
        FimoError: in one line, where nothing could be computed at all.
    """
    store.check()
    manifest = resolved.manifest
    sweep = Sweep(store, manifest.spec.name)
    sweep.write_manifest(manifest)
    if retry_failed:
        forget_failures(sweep)
    outcome = Outcome()
    for _ in range(ROUNDS):
        tasks, planned = owed(manifest, sweep)
        tasks = [t for t in tasks if shards or isinstance(t, EstimateTask)]
        if tasks:
            _compute(resolved, sweep, tasks, planned, listener, should_stop, where or on_ray(None), outcome)
        found = gather.gather(sweep, manifest, listener.say)
        for _, why in found.bad:
            listener.say(f"{why}; set aside under {sweep.uri}/rejected and computed again")
        gather.reject(sweep, found)
        if not found.bad or outcome.stopped:
            break
    return Report(found, gather.write_tables(sweep, found), outcome, failures(sweep), shards)


def owed(manifest: Manifest, sweep: Sweep) -> tuple[list[Task], Plan]:
    """What is to be computed, in order: shards by seed, estimates in between; tasks set aside before are left out."""
    planned = current_plan(manifest, sweep)
    aside = {name for name, _ in failures(sweep)}
    shards = [s for s in planned.shards if task_id(manifest, s) not in aside]
    estimates = [e for e in missing_estimates(manifest, sweep) if task_id(manifest, e) not in aside]
    mixed = chain.from_iterable(zip_longest(estimates, shards))
    return [task for task in mixed if task is not None], planned


def _compute(
    resolved: Resolved,
    sweep: Sweep,
    tasks: Sequence[Task],
    planned: Plan,
    listener: Listener,
    should_stop: Callable[[], str | None],
    where: Where,
    total: Outcome,
) -> None:
    manifest = resolved.manifest
    for removals in {t.removals for t in tasks}:
        sweep.write_set(manifest.digest, removals)
    context = Context(
        store=sweep.store,
        sweep=sweep.name,
        spec=canonical(manifest.spec.canonical()),
        beside=manifest.beside,
        digest=manifest.digest,
        estimate_digest=manifest.estimate_digest,
    )
    resources = manifest.spec.resources
    deadline = None if resources.deadline_s == "auto" else resources.deadline_s
    listener.start(planned, len(tasks))
    with where(context, resolved.final_model, resources) as pool:
        outcome = drive(tasks, pool, listener.result, should_stop, deadline)
    total.receipts += outcome.receipts
    total.stopped, total.broken = outcome.stopped, outcome.broken
    total.lost += outcome.lost
    if outcome.broken:
        total.set_aside += outcome.set_aside
        return
    for item in outcome.set_aside:
        record_failure(manifest, sweep, item)


# -- tasks set aside -----------------------------------------------------------------------------------------------


def task_id(manifest: Manifest, task: Task) -> str:
    """A name for a task that is the same in every run of it."""
    if isinstance(task, Shard):
        return f"{manifest.digest[:16]}-seed-{task.seed:010d}-{set_hash(task.removals)}"
    about = [task.estimator, task.params, set_hash(task.removals), task.first]
    return f"{manifest.digest[:16]}-estimate-{digest(about)[:16]}"


def record_failure(manifest: Manifest, sweep: Sweep, item: SetAside) -> None:
    """Keep a set-aside task's error and traceback in the store."""
    body = {
        "task": task_name(item.task),
        "error": item.line,
        "traceback": item.traceback,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    sweep.store.put(f"{sweep.name}/failed/{task_id(manifest, item.task)}.json", canonical(body).encode())


def failures(sweep: Sweep) -> list[tuple[str, str]]:
    """(task id, error) of every task set aside."""
    found = []
    for entry in sweep.store.list(f"{sweep.name}/failed/"):
        try:
            body = json.loads(sweep.store.get(entry.key))
            line = f"{body['task']}: {body['error']}"
        except (ValueError, KeyError, TypeError, NotFound, RecursionError):
            line = "its record cannot be read"
        found.append((entry.key.rsplit("/", 1)[-1].removesuffix(".json"), line))
    return found


def forget_failures(sweep: Sweep) -> None:
    """Let every task that was set aside be tried again."""
    for entry in list(sweep.store.list(f"{sweep.name}/failed/")):
        sweep.store.delete(entry.key)
