"""What runs is seen, from the terminal and from the store, and decides nothing."""

from __future__ import annotations

import io
import json
import time
from contextlib import contextmanager

from rich.console import Console

from fimo.orchestrator.report import progress as progress_report
from fimo.orchestrator.report.course import course_lines
from fimo.orchestrator.report.progress import ProgressReport
from fimo.orchestrator.report.status import driver_lines, status_lines
from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.run import driver as runs
from fimo.orchestrator.run import heartbeat
from fimo.orchestrator.run.course import Course
from fimo.orchestrator.run.heartbeat import Heartbeat, drivers
from fimo.orchestrator.run.places import LocalPool, in_process
from fimo.orchestrator.run.results import Receipt
from fimo.orchestrator.run.schedule import drive
from fimo.orchestrator.run.status import sweep_status
from fimo.orchestrator.run.tasks import run_task
from fimo.orchestrator.run.work import EstimateTask, Shard, WitnessTask
from fimo.orchestrator.store import MemoryStore
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.errors import StoreError
from tests.support.small_sweep import make_spec, run_here

CG = EstimateTask("cg", '{"damping":0.1}', (), 0, 1)


def course() -> Course:
    of = Course.of(40, 10, [Shard(0, ()), Shard(1, ()), CG, CG, WitnessTask(0, ())])
    of.began = time.monotonic() - 10
    of.finish(Shard(0, ()), 5)
    of.run([(Shard(1, ()), 2.0), (CG, 130.0)])
    return of


def test_a_course_counts_what_is_left_by_name_and_how_fast_it_goes():
    values = course().json()
    assert values["left"] == {"cg": 2, "shard": 1, "witness": 1}
    assert (values["done"], values["cells"]) == (15, 40)
    assert [r["task"] for r in values["running"]] == ["estimator cg", "seed 1, 0 removals"]
    assert abs(values["cells_per_second"] - 0.5) < 0.01
    assert abs(values["finish_in_s"] - 50) < 1
    lines = course_lines(values)
    assert lines[0] == "0.5 cells a second, its cells done in about 50 s"
    assert lines[1] == "running: estimator cg (2 min), seed 1, 0 removals (2 s)"
    assert lines[2] == "not finished: cg × 2, 1 shard, 1 witness"


def test_a_task_runs_from_when_a_slot_was_free_not_from_when_it_was_handed_over():
    turns, pool = [], LocalPool(lambda task: (time.sleep(0.05), Receipt("k", True, 1, 0, 0.05, "cpu"))[1])
    drive([Shard(seed, ()) for seed in range(3)], pool, on_turn=lambda running, waits: turns.append(running))
    assert [[task.seed for task, _ in turn] for turn in turns] == [[0], [1], [2]]
    assert all(seconds < 0.04 for turn in turns for _, seconds in turn)


def test_a_running_driver_is_heard_in_the_store_and_gone_when_it_ends(beside, monkeypatch):
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.05)
    store, heard = MemoryStore(), []
    spec = make_spec()

    @contextmanager
    def slow(sweep, manifest, final_model):
        def work(task):
            time.sleep(1.3 if not heard else 0)
            heard.append(drivers(sweep))
            return run_task(sweep, manifest, final_model, task)

        yield LocalPool(work)

    report = runs.run(resolve(spec, beside), store, where=slow)
    assert report.exit_code == 0
    [first] = heard[0]
    assert first["left"] == {"grad_cos": 1, "grad_dot": 1, "shard": 12}
    assert first["running"][0]["seconds"] > 0
    assert not first["silent"]
    sweep = Sweep(store, "flowers")
    assert not drivers(sweep), "deleted at the end"
    assert driver_lines(first)[0].startswith("driver on ")


def test_a_store_that_takes_no_heartbeat_disturbs_no_run(beside, monkeypatch):
    class Deaf(MemoryStore):
        def put(self, key, data):
            if "/drivers/" in key:
                raise StoreError("no")
            super().put(key, data)

    monkeypatch.setattr(heartbeat, "EVERY_S", 0.01)
    report, _, _ = run_here(make_spec(), beside, Deaf())
    assert report.exit_code == 0


def test_a_driver_that_was_killed_is_told_as_silent_and_cleared_away_later(beside, monkeypatch):
    _, store, _ = run_here(make_spec(), beside)
    sweep = Sweep(store, "flowers")
    store.put(keys.driver("flowers", "gone-1"), json.dumps({"host": "h", "pid": 1, **course().json()}).encode())
    store.put(keys.driver("flowers", "foreign"), b'{"left": 3}')
    store.put(keys.driver("flowers", "torn"), b"{")
    monkeypatch.setattr(heartbeat, "SILENT_S", -1.0)
    status = sweep_status(sweep)
    [line] = [line for line in status_lines(status) if line.startswith("driver")]
    assert "most likely ended" in line
    assert status["complete"], "it decides nothing"
    monkeypatch.setattr(heartbeat, "FORGOTTEN", heartbeat.timedelta(seconds=-1))
    with Heartbeat(sweep):
        deadline = time.monotonic() + 10
        while list(store.list("flowers/drivers/")) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert not list(store.list("flowers/drivers/"))


def test_log_lines_name_what_runs_where_there_is_no_terminal(beside, monkeypatch):
    monkeypatch.setattr(progress_report, "LOG_EVERY_S", 0.0)
    monkeypatch.setattr(progress_report, "LOG_SHARE", 0.0)
    text = io.StringIO()
    with ProgressReport(Console(file=text, width=200)) as progress:
        listener = progress.listener
        runs.run(resolve(make_spec(), beside), MemoryStore(), listener, where=in_process)
    lines = text.getvalue().splitlines()
    assert any("running: estimator grad_dot" in line for line in lines)
    assert any("of 20 cells done" in line and "cells a second" in line for line in lines)
