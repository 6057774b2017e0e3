"""Running a sweep: compute what is missing and no more, reduce, score.

Everything that a run knows is in the store when it ends, however it ends; a run on an interrupted or finished sweep
subtracts what is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from fimo.orchestrator.resolve.differences import in_words, since
from fimo.orchestrator.resolve.loading import read_final
from fimo.orchestrator.resolve.resolved import Resolved
from fimo.orchestrator.run import failures
from fimo.orchestrator.run.claims import Claims, SharedTasks
from fimo.orchestrator.run.course import Course
from fimo.orchestrator.run.failures import Failures
from fimo.orchestrator.run.gather import gather
from fimo.orchestrator.run.growing import ROUNDS, grown, reject, reject_records, with_its_seeds
from fimo.orchestrator.run.heartbeat import Heartbeat
from fimo.orchestrator.run.owed import cells_in, estimators_in, few_shards, owed_tasks, remaining, to_hand_over
from fimo.orchestrator.run.places import Pool, Source
from fimo.orchestrator.run.plan import Plan
from fimo.orchestrator.run.pool import on_ray
from fimo.orchestrator.run.reading import Gathered
from fimo.orchestrator.run.results import Outcome, Receipt, Result
from fimo.orchestrator.run.schedule import drive
from fimo.orchestrator.run.work import EstimateTask, Task, WitnessTask, Work, tasks_in
from fimo.orchestrator.run.written import write_tables
from fimo.orchestrator.store import Store
from fimo.orchestrator.store.watched import WatchedStore
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.errors import FimoError, UsageError

Where = Callable[[Sweep, Manifest, bytes | None], AbstractContextManager[Pool]]
"""A place to run tasks: an embedded Ray, a cluster, or this process. The bytes are those of θᶠ's file."""


@dataclass(frozen=True)
class Report:
    """How a run ended.

    Attributes:
        sweep: STORE/NAME.
        gathered: the tables, and what was met in making them.
        written: the tables' URIs by name.
        failures: tasks set aside and estimators left out, of this run and of those before.
        owed_cells, owed_estimators, owed_witnesses: what a further run would compute.
        shards: False if the run was of estimates alone.
        lacking: what was reported done, and is not in the store as it should be: why, or empty.
        larger: this run was of a part of the sweep that its store holds, whose tables were left as they are.
    """

    sweep: str
    gathered: Gathered
    written: dict[str, str]
    outcome: Outcome
    failures: Failures
    owed_cells: int = 0
    owed_estimators: int = 0
    shards: bool = True
    owed_witnesses: int = 0
    lacking: str = ""
    larger: bool = False

    @property
    def complete(self) -> bool:
        """Whether all that was asked for is there."""
        return self.gathered.complete if self.shards else self.gathered.estimated

    @property
    def exit_code(self) -> int:
        """0 complete, 1 failed, 3 incomplete."""
        if self.failures.aside or self.outcome.set_aside or self.gathered.diverged or self.outcome.broken:
            return 1
        if self.gathered.nonsense or self.lacking:
            return 1
        return 0 if self.complete else 3


@dataclass(frozen=True)
class Listener:
    """Who is told of progress: the plan and the number of tasks owed, each result, lines of talk, and every turn."""

    start: Callable[[Plan, int], None]
    result: Callable[[Work, Result], None]
    say: Callable[[str], None]
    turn: Callable[[Course], None] = lambda course: None


SILENT = Listener(lambda plan, tasks: None, lambda task, result: None, lambda line: None)


def run(
    resolved: Resolved,
    store: Store,
    listener: Listener = SILENT,
    should_stop: Callable[[], str | None] = lambda: None,
    where: Where | None = None,
    retry_failed: bool = False,
    shards: bool = True,
    replace_other: bool = False,
) -> Report:
    """Compute what is missing of a sweep, then reduce and score.

    Args:
        should_stop: asked now and then; a reason ends the run in good order.
        where: the pool that tasks run in; default: an embedded Ray.
        retry_failed: have every task tried again that was given up before.
        shards: False computes the estimates alone.
        replace_other: let the sweep take the place of one of its name and another digest.

    Raises:
        UsageError: the store has a sweep of this name and another digest.
        FimoError: in one line, if nothing could be computed at all.
    """
    with WatchedStore(store, listener.say) as watched:
        watched.check()
        sweep = Sweep(watched, resolved.manifest.spec.name)
        if not replace_other:
            refuse_other(resolved.manifest, sweep)
        with contextlib.ExitStack() as ours:
            place = ours.enter_context(on_ray(None)) if where is None else where
            return _run(resolved.manifest, sweep, listener, should_stop, place, retry_failed, shards, replace_other)


def _run(
    manifest: Manifest,
    sweep: Sweep,
    listener: Listener,
    should_stop: Callable[[], str | None],
    where: Where,
    retry_failed: bool,
    shards: bool,
    replace_other: bool,
) -> Report:
    manifest = with_its_seeds(manifest, sweep, exactly=shards)
    larger = not replace_other and is_part_of(manifest, sweep)
    if not larger:
        sweep.write_manifest(manifest)
    if retry_failed:
        failures.forget(sweep)
    outcome = Outcome()

    def compute(of: Manifest, tasks: list[Task], plan: Plan) -> None:
        note_sets(of, sweep, tasks)
        reject_records(sweep, of.digest, listener.say)
        listener.start(plan, len(tasks))
        final_model, course = read_final(of.spec, Path(of.beside)), Course.of(plan.cells, plan.done, tasks)
        with Heartbeat(sweep) as heartbeat, where(sweep, of, final_model) as pool:
            heartbeat.follow(course)
            work = to_hand_over(of, sweep, tasks)
            if (line := few_shards(work, pool.slots())) is not None:
                listener.say(line)
            with Claims(sweep, of, heartbeat) as claims:
                shared = SharedTasks(work, claims, lambda work: _remaining(of, sweep, work, course))
                _compute(of, sweep, shared, pool, listener, should_stop, outcome, course)

    if shards and manifest.spec.seeds.until_reliability is not None:
        manifest = grown(manifest, sweep, compute, listener.say, outcome, note=not larger)
    for _ in range(ROUNDS):
        tasks, plan = _owed(manifest, sweep, shards)
        if tasks and not outcome.stopped:
            compute(manifest, tasks, plan)
        gathered = gather(sweep, manifest, listener.say)
        reject(sweep, gathered, listener.say)
        if outcome.stopped or (not gathered.bad and _is_settled(manifest, sweep, gathered, shards)):
            break
    # Another driver may have begun with a larger spec meanwhile.
    larger = larger or (not replace_other and is_part_of(manifest, sweep))
    written = {} if larger else write_tables(sweep, gathered.tables, gathered.stamp, gathered.warnings)
    return replace(_report(manifest, sweep, gathered, written, outcome, shards), larger=larger)


def _is_settled(manifest: Manifest, sweep: Sweep, gathered: Gathered, shards: bool) -> bool:
    """Whether nothing more can come: all is there, or what is not was given up. Other drivers may set objects aside."""
    if gathered.gone:
        return False
    complete = gathered.complete if shards else gathered.estimated
    return complete or bool(failures.read(sweep, manifest).aside)


def is_part_of(manifest: Manifest, sweep: Sweep) -> bool:
    """Whether the store's sweep of this name and digest has all cells that the manifest asks for, and more."""
    try:
        there = sweep.read_manifest()
    except FimoError:
        return False
    if there.digest != manifest.digest:
        return False
    ours, theirs = ({removal.indices for removal in of.removals} for of in (manifest, there))
    # A sweep that adds seeds by itself may come to have all of them.
    mine, others = (
        set(range(of.first, of.after or of.first + of.count)) for of in (manifest.spec.seeds, there.spec.seeds)
    )
    return ours <= theirs and mine <= others and (ours, mine) != (theirs, others)


def refuse_other(manifest: Manifest, sweep: Sweep) -> None:
    """Refuse to take the place of a sweep of the same name whose numbers are others."""
    try:
        there = sweep.read_manifest()
    except UsageError:
        return  # There is none.
    if there.digest != manifest.digest:
        changed = in_words(since(there, manifest)) or "something that its numbers depend on"
        raise UsageError(
            f"{sweep.uri} is another sweep of this name: since then {changed} changed. Give this one another name, or "
            "--replace it (its parts stay in the store, and count again if the change is undone)"
        )


def _owed(manifest: Manifest, sweep: Sweep, shards: bool) -> tuple[list[Task], Plan]:
    tasks, plan = owed_tasks(manifest, sweep, failures.read(sweep, manifest))
    return [task for task in tasks if shards or isinstance(task, EstimateTask)], plan


def note_sets(manifest: Manifest, sweep: Sweep, tasks: Sequence[Task]) -> None:
    """A set of removals is in the store before anything that its hash names."""
    for removals in {task.removals for task in tasks if not isinstance(task, WitnessTask)}:
        sweep.write_set(manifest.digest, removals)


def _remaining(manifest: Manifest, sweep: Sweep, work: Sequence[Work], course: Course) -> list[Work]:
    """What other drivers have left of some tasks; what they have done is noted."""
    tasks = [task for one in work for task in tasks_in(one)]
    left = remaining(manifest, sweep, tasks)
    cells = cells_in(tasks) - cells_in(left)
    course.by_others(tasks, left, cells)
    return to_hand_over(manifest, sweep, left)


def _compute(
    manifest: Manifest,
    sweep: Sweep,
    tasks: Source,
    pool: Pool,
    listener: Listener,
    should_stop: Callable[[], str | None],
    total: Outcome,
    course: Course,
) -> None:
    """Drive the tasks, add the outcome to ``total``, and record what was given up."""
    deadline = manifest.spec.resources.deadline_s

    def result(task: Work, of: Result) -> None:
        if isinstance(of, Receipt):
            course.finish(task, of.cells)
        listener.result(task, of)

    def turn(running: Sequence[tuple[Work, float]], waits: str | None) -> None:
        course.run(running, waits)
        listener.turn(course)

    limit = None if deadline == "auto" else deadline
    outcome = drive(tasks, pool, result, should_stop, limit, on_turn=turn)
    total.receipts += outcome.receipts
    total.stopped, total.broken = outcome.stopped, outcome.broken
    total.lost += outcome.lost
    if outcome.broken:
        # A bug that fails every shard is no verdict on any of them: nothing is recorded.
        total.set_aside += outcome.set_aside
        return
    for given_up in outcome.set_aside:
        failures.record(manifest, sweep, given_up)


def _report(
    manifest: Manifest, sweep: Sweep, gathered: Gathered, written: dict[str, str], outcome: Outcome, shards: bool
) -> Report:
    report = Report(sweep.uri, gathered, written, outcome, failures.read(sweep, manifest), shards=shards)
    if report.complete:
        return report
    tasks, _ = _owed(manifest, sweep, shards)
    if tasks and not outcome.stopped and not report.failures.aside:
        # Every task has said that it is done: to do it once more would say the same.
        why = gathered.bad[0][1] if gathered.bad else "the store does not list it"
        report = replace(report, lacking=f"{len(tasks)} tasks were done, and what they wrote cannot be used: {why}")
    cells, lacking = cells_in(tasks), len(estimators_in(tasks))
    witnesses = sum(len(task.removals) for task in tasks if isinstance(task, WitnessTask))
    return replace(report, owed_cells=cells, owed_estimators=lacking, owed_witnesses=witnesses)
