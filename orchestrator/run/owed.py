"""What a sweep still owes: list what the store holds, subtract it from what the manifest asks for.

Resuming is this and nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, zip_longest

from fimo.orchestrator.run.blocks import Named, held_removals, listed_blocks, shares, value_digest
from fimo.orchestrator.run.failures import Failures, task_id
from fimo.orchestrator.run.plan import EACH, Plan, make_plan, seeds_together, size_of_shards
from fimo.orchestrator.run.witness_plan import witness_tasks
from fimo.orchestrator.run.work import EstimateTask, Shard, Task, Together, WitnessTask, Work, as_work
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.store import NotFound
from fimo.orchestrator.sweep import keys, records
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.parts import BadPartError
from fimo.orchestrator.sweep.sweep import Sweep

Done = Mapping[int, set[tuple[int, ...]]]
"""Seed -> the removals (as index tuples) that its parts hold."""

LARGE = 8
"""Places from which on shards are counted: each should have ``EACH``."""


def current_plan(manifest: Manifest, sweep: Sweep | None, done: Done | None = None) -> Plan:
    """The plan against what the store holds; against nothing if there is no sweep.

    ``done``: what it holds, if that is known; else its parts are listed.
    """
    if done is None:
        done = sweep.done(manifest, sweep.list_parts(manifest.digest)) if sweep is not None else {}
    return make_plan(
        manifest.removals,
        manifest.spec.seeds,
        done,
        manifest.spec.further_training.settings(),
        manifest.train,
        manifest.evals,
        size_of_shards(manifest),
    )


def missing_estimates(
    manifest: Manifest, sweep: Sweep, failures: Failures, at: int | None = None
) -> list[EstimateTask]:
    """One task for each estimator, seed that it trains with, and block of evaluation examples that removals still lack.

    Estimators that are left out of the default set owe nothing.
    """
    tasks: list[EstimateTask] = []
    for (estimator, params), entries in listed_blocks(sweep, manifest, at):
        if (estimator, params) in failures.left_out:
            continue
        prefix = keys.estimates(sweep.name, value_digest(manifest, estimator, params, at), estimator, params)
        held: dict[tuple[int | None, int, int], set[tuple[int, ...]]] = {}
        for entry in entries:
            block = keys.read_block_key(entry.key, prefix)
            if block is not None:
                seed, set_name, first, count = block
                removals = held_removals(sweep, manifest, entry.key, set_name)
                held.setdefault((seed, first, count), set()).update(r.indices for r in removals)
        for seed, first, count in shares(manifest, estimator, params):
            lacking = tuple(r for r in manifest.removals if r.indices not in held.get((seed, first, count), set()))
            if lacking:
                tasks.append(EstimateTask(estimator, params, lacking, first, count, count == manifest.evals, seed, at))
    return tasks


def missing_witnesses(manifest: Manifest, sweep: Sweep, failures: Failures) -> list[WitnessTask]:
    """The seeds that still lack witnesses; any witnesses of a seed will do, and one that is left out owes nothing."""
    wanted = [task for task in witness_tasks(manifest) if task.seed not in failures.witnesses]
    held = set(sweep.list_witnesses(manifest.digest)) if wanted else set()
    return [task for task in wanted if task.seed not in held]


def owed_tasks(
    manifest: Manifest, sweep: Sweep, failures: Failures, done: Done | None = None
) -> tuple[list[Task], Plan]:
    """What a run would compute now, in order: shards by seed, estimates in between, witnesses last.

    What was set aside is left out. ``done`` as for ``current_plan``.
    """
    plan = current_plan(manifest, sweep, done)
    aside, shards = failures.ids, list(plan.shards)
    missing = missing_estimates(manifest, sweep, failures)
    owed = [e for e in missing if task_id(manifest, e) not in aside]
    if aside:
        # Nearly always there is none, and the name of each of many shards takes a while.
        shards = [s for s in shards if task_id(manifest, s) not in aside]
    mixed = chain.from_iterable(zip_longest(owed, shards))
    return [*(task for task in mixed if task is not None), *missing_witnesses(manifest, sweep, failures)], plan


def remaining(manifest: Manifest, sweep: Sweep, tasks: Sequence[Task]) -> list[Task]:
    """Of some tasks, those that the store still lacks, in order, and of a shard the removals that no part holds.

    Raises:
        StoreError: the store cannot be read.
    """
    kinds = {type(task) for task in tasks}
    done = sweep.done(manifest, sweep.list_parts(manifest.digest)) if Shard in kinds else {}
    witnesses = set(sweep.list_witnesses(manifest.digest)) if WitnessTask in kinds else set[int]()
    estimates: dict[tuple[object, ...], tuple[NamedRemoval, ...]] = {}
    if EstimateTask in kinds:
        missing = missing_estimates(manifest, sweep, Failures((), {}))
        estimates = {_block_of(task): task.removals for task in missing}
    left = list[Task]()
    for task in tasks:
        if isinstance(task, Shard):
            lacking = tuple(r for r in task.removals if r.indices not in done.get(task.seed, set()))
            left += [Shard(task.seed, lacking)] * bool(lacking)
        elif isinstance(task, WitnessTask):
            left += [task] * (task.seed not in witnesses)
        elif _block_of(task) in estimates:
            left.append(replace(task, removals=estimates[_block_of(task)]))
    return left


def _block_of(task: EstimateTask) -> tuple[object, ...]:
    return task.estimator, task.params, task.seed, task.first, task.count


def to_hand_over(manifest: Manifest, sweep: Sweep, tasks: Sequence[Task]) -> list[Work]:
    """The tasks as a pool is given them: shards that are trained in the same stacks as one.

    Raises:
        StoreError: the store cannot be read.
    """
    together = seeds_together(manifest, len(manifest.removals))
    listed = sweep.list_parts(manifest.digest) if together > 1 else []
    held, seeds = {(part.seed, part.set): part.key for part in listed}, manifest.spec.seeds

    def mates(owed: Sequence[Shard]) -> set[int]:
        """Of a stack that was interrupted, what is committed stands right before, or after, what is owed.

        A part that does not verify is owed as soon as it is set aside: it was trained beside these, or is to be.
        """
        name, lost, found = keys.set_hash(owed[0].removals), {shard.seed for shard in owed}, set[int]()
        begin = owed[0].seed - (owed[0].seed - seeds.first) % together
        block = range(begin, min(begin + together, seeds.first + seeds.count))
        beside = deque(one + step for one in sorted(lost) for step in (-1, 1))
        while beside:
            seed = beside.popleft()
            if (seed, name) not in held or seed in found | lost:
                continue
            try:
                named = records.together(sweep.read_part(held[seed, name], manifest).provenance)
            except (ValueError, NotFound):
                continue
            except BadPartError:
                if seed in block:
                    lost.add(seed)
                    beside += [seed - 1, seed + 1]
                continue
            if any((one, name) in named for one in lost):
                found |= {other for other, of in named if of == name and (other, name) in held}
        return found | lost

    return as_work(tasks, together, seeds.first, mates)


def cells_in(tasks: Sequence[Task]) -> int:
    """The cells that tasks would train, without the baselines."""
    return sum(len(task.removals) for task in tasks if isinstance(task, Shard))


def few_shards(work: Sequence[Work], slots: int) -> str | None:
    """What to do if a large cluster has so few shards that at the end all of it waits for the slowest; else None."""
    shards = [one for one in work if isinstance(one, Shard)]
    blocks = [one for one in work if isinstance(one, Together)]
    count = len(shards) + len(blocks)
    if slots < LARGE or not count or count >= EACH * slots:
        return None
    if blocks:
        most = max(len(block.shards) for block in blocks)
        return (
            f"{count} tasks for {slots} places, of up to {most} seeds each: at the end they wait for the slowest; a "
            "smaller `resources: {together}` makes more"
        )
    size = max(1, cells_in(shards) // (EACH * slots))
    if size >= max(len(shard.removals) for shard in shards):
        return None
    return (
        f"{len(shards)} shards for {slots} places: at the end they wait for the slowest; "
        f"`resources: {{shard: {size}}}` makes about {EACH} for each (a shard trains two baselines besides)"
    )


def estimators_in(tasks: Sequence[Task]) -> set[Named]:
    """The estimators that tasks would compute."""
    return {(task.estimator, task.params) for task in tasks if isinstance(task, EstimateTask)}


def is_complete(manifest: Manifest, sweep: Sweep, failures: Failures) -> bool:
    """Whether the store lists every cell, estimate and witness, and no seeds are to come; raises StoreError."""
    return manifest.settled and not (
        current_plan(manifest, sweep).missing
        or missing_estimates(manifest, sweep, failures)
        or missing_witnesses(manifest, sweep, failures)
    )
