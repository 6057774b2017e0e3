"""Several drivers on one sweep: they share the work, and wait for nobody who is dead."""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime, timedelta

import pytest

from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.run import claims, heartbeat
from fimo.orchestrator.run import driver as runs
from fimo.orchestrator.run.claims import Claims, SharedTasks
from fimo.orchestrator.run.course import Course
from fimo.orchestrator.run.failures import task_id
from fimo.orchestrator.run.heartbeat import Heartbeat
from fimo.orchestrator.run.owed import owed_tasks, remaining
from fimo.orchestrator.run.places import in_process
from fimo.orchestrator.run.results import ConflictError, SetAside
from fimo.orchestrator.run.status import sweep_status
from fimo.orchestrator.run.work import EstimateTask, Shard
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.store import Entry, LocalStore, MemoryStore
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers import joined
from fimo.workers.errors import StoreError
from tests.support.small_sweep import make_spec, run_here


@pytest.fixture
def problem(beside):
    return resolve(make_spec(), beside)


def claim(sweep: Sweep, task, manifest, **about) -> None:
    body = {"driver": "elsewhere-1", "machine": "another", "pid": 1, "started": "1", **about}
    sweep.store.create(keys.claim(sweep.name, task_id(manifest, task)), json.dumps(body).encode())


def beat(sweep: Sweep, name: str = "elsewhere-1") -> None:
    body = {"host": "elsewhere", **Course.of(1, 0, []).json()}
    sweep.store.put(keys.driver(sweep.name, name), json.dumps(body).encode())


def shards_of(problem, sweep) -> list[Shard]:
    tasks, _ = owed_tasks(problem.manifest, sweep, runs.failures.read(sweep, problem.manifest))
    return [task for task in tasks if isinstance(task, Shard)]


class Aged(MemoryStore):
    """Objects under some prefix look as old as is said."""

    def __init__(self, prefix: str, age_s: float) -> None:
        super().__init__()
        self.prefix, self.age_s = prefix, age_s

    def list(self, prefix):
        for entry in super().list(prefix):
            old = datetime.now(UTC) - timedelta(seconds=self.age_s)
            yield Entry(entry.key, entry.size, old) if entry.key.startswith(self.prefix) else entry


def test_three_drivers_at_once_compute_each_shard_once(problem, tmp_path):
    store = LocalStore(str(tmp_path), tmp_path)
    log = tmp_path / "log"

    def run(number: int) -> int:
        real = joined.run_shard

        def slow(*arguments):
            with log.open("a") as file:
                file.write(f"{arguments[2]} {len(arguments[1])} {arguments[1][0]}\n")
            time.sleep(0.3)
            return real(*arguments)

        joined.run_shard = slow
        return runs.run(problem, store, where=in_process).exit_code

    pids = []
    for number in range(3):
        pid = os.fork()
        if pid == 0:
            code = 9
            try:
                code = run(number)
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0, 0]
    begun = log.read_text().splitlines()
    assert len(set(begun)) == 12
    assert len(begun) <= 13, "at most a tenth computed twice"
    assert not list(store.list("flowers/claims/"))
    assert not list(store.list("flowers/drivers/"))


def test_what_a_dead_process_of_this_machine_has_claimed_is_taken_over_at_once(problem, beside):
    store = MemoryStore()
    sweep = Sweep(store, "flowers")
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    for task in shards_of(problem, sweep):
        claim(sweep, task, problem.manifest, machine=heartbeat._machine(), pid=gone)
    beat(sweep)
    began = time.monotonic()
    report, _, _ = run_here(make_spec(), beside, store)
    assert report.exit_code == 0
    assert time.monotonic() - began < 20


def test_what_a_silent_driver_elsewhere_has_claimed_is_taken_over(problem, beside):
    store = Aged("flowers/drivers/elsewhere", heartbeat.SILENT_S + 1)
    sweep = Sweep(store, "flowers")
    for task in shards_of(problem, sweep):
        claim(sweep, task, problem.manifest)
    beat(sweep)
    report, _, _ = run_here(make_spec(), beside, store)
    assert report.exit_code == 0


def test_what_a_live_driver_has_claimed_is_left_to_it_until_it_is_done_or_silent(problem, beside, monkeypatch):
    monkeypatch.setattr(claims, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(heartbeat, "KEPT_S", 0.0)
    store = Aged("flowers/drivers/elsewhere", 1.0)
    sweep = Sweep(store, "flowers")
    waiting = shards_of(problem, sweep)[:2]
    for task in waiting:
        claim(sweep, task, problem.manifest)
    beat(sweep)
    said = []

    def turn(course):
        if course.waits is not None:
            said.append(course.waits[0])
            store.age_s = heartbeat.SILENT_S + 1

    listener = runs.Listener(lambda plan, tasks: None, lambda task, result: None, said.append, turn)
    report = runs.run(problem, store, listener, where=in_process)
    assert report.exit_code == 0
    assert said[0] == "other drivers of this sweep, which compute 2 tasks"
    computed = [receipt.key for receipt in report.outcome.receipts if "/parts/" in receipt.key]
    last = [keys.part("flowers", problem.manifest.digest, task.seed, task.removals) for task in waiting]
    assert set(computed[-2:]) == set(last), "what was left is computed last, and by this driver"


def test_what_others_finish_meanwhile_is_not_computed_and_is_counted(problem, beside, monkeypatch):
    monkeypatch.setattr(claims, "LOOK_EVERY_S", 0.0)
    _, done, _ = run_here(make_spec(), beside)
    store = MemoryStore()
    sweep = Sweep(store, "flowers")
    sweep.write_manifest(problem.manifest)
    tasks, plan = owed_tasks(problem.manifest, sweep, runs.failures.read(sweep, problem.manifest))
    course = Course.of(plan.cells, plan.done, tasks)
    with Heartbeat(sweep) as own:
        own.follow(course)
        for task in tasks:
            claim(sweep, task, problem.manifest)
        beat(sweep)
        with Claims(sweep, problem.manifest, own) as held:
            shared = SharedTasks(tasks, held, lambda some: runs._remaining(problem.manifest, sweep, some, course))
            assert shared.take(100) == []
            assert shared.waits == len(tasks)
            for entry in done.list("flowers/"):
                if entry.key.split("/")[1] in ("parts", "sets", "estimates", "witnesses"):
                    store.create(entry.key, done.get(entry.key))
            assert shared.take(100) == []
            assert not shared.open
    assert course.done == plan.cells
    assert not course.left


def test_of_a_shard_only_what_no_part_holds_is_computed(problem, beside):
    """Another driver may cut its shards otherwise."""
    _, store, _ = run_here(make_spec(), beside)
    sweep, first = Sweep(store, "flowers"), next(store.list("flowers/parts/")).key
    store.delete(first)
    whole = [Shard(seed, problem.manifest.removals) for seed in problem.manifest.spec.seeds]
    [left] = remaining(problem.manifest, sweep, whole)
    assert isinstance(left, Shard)
    assert 0 < len(left.removals) < len(problem.manifest.removals)
    assert keys.part("flowers", problem.manifest.digest, left.seed, left.removals) == first


def test_a_store_that_takes_no_claims_disturbs_no_run(beside):
    class Deaf(MemoryStore):
        def create(self, key, data):
            if "/claims/" in key:
                raise StoreError("no")
            return super().create(key, data)

    report, _, _ = run_here(make_spec(), beside, Deaf())
    assert report.exit_code == 0


def test_two_drivers_that_take_over_one_claim_do_not_both_have_it(problem):
    store = Aged("flowers/drivers/elsewhere", heartbeat.SILENT_S + 1)
    sweep = Sweep(store, "flowers")
    [task, *_] = shards_of(problem, sweep)
    claim(sweep, task, problem.manifest)
    beat(sweep)
    with Heartbeat(sweep) as first, Heartbeat(sweep) as second:
        for own in (first, second):
            own.follow(Course.of(1, 0, [task]))
        with Claims(sweep, problem.manifest, first) as ours, Claims(sweep, problem.manifest, second) as theirs:
            assert ours.take([task]) == [True]
            assert theirs.take([task]) == [False]
            ours.release(task)
            deadline = time.monotonic() + 10
            while theirs.take([task]) == [False] and time.monotonic() < deadline:
                time.sleep(0.01)
            assert ours.take([task]) == [False]


def test_claims_of_the_dead_are_cleared_away_in_time_and_those_of_the_living_stay(problem, monkeypatch):
    monkeypatch.setattr(claims, "FORGOTTEN", timedelta(seconds=-1))
    store = MemoryStore()
    sweep = Sweep(store, "flowers")
    dead, alive, *_ = shards_of(problem, sweep)
    claim(sweep, dead, problem.manifest, driver="nobody")
    claim(sweep, alive, problem.manifest)
    store.put(keys.claim("flowers", "torn"), b"[")
    beat(sweep)
    with Heartbeat(sweep) as own, Claims(sweep, problem.manifest, own):
        pass
    assert [entry.key for entry in store.list("flowers/claims/")] == [
        keys.claim("flowers", task_id(problem.manifest, alive))
    ]


def test_a_task_that_was_set_aside_and_committed_since_counts_against_nobody(problem, beside):
    """Two drivers with other stacks round otherwise: the second one's rows are refused, and the sweep is whole."""
    _, store, _ = run_here(make_spec(), beside)
    sweep, manifest = Sweep(store, "flowers"), problem.manifest
    error, estimate = ConflictError("other rows"), EstimateTask("grad_dot", "{}", manifest.removals, 0, manifest.evals)
    whole, extra = Shard(0, manifest.removals), Shard(0, (*manifest.removals, NamedRemoval(99, "none", (3, 1, 4))))
    for task in (whole, extra, estimate):
        runs.failures.record(manifest, sweep, SetAside(task, str(error), "Traceback"))
    [left] = runs.failures.read(sweep, manifest).aside
    assert left.id == task_id(manifest, extra), "one of its cells is not there"
    store.delete(keys.failed("flowers", left.id))
    report, _, _ = run_here(make_spec(), beside, store)
    assert report.exit_code == 0
    assert sweep_status(sweep)["exit_code"] == 0
