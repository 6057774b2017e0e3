"""`fimo status` between a submission and the sweep's beginning, and after a job that never began it."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fimo.orchestrator.cluster import jobs
from fimo.orchestrator.commands import status
from fimo.orchestrator.run.course import Course
from fimo.orchestrator.run.heartbeat import Heartbeat
from fimo.orchestrator.store import LocalStore
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.sweep import Sweep, open_sweep
from tests.support.shell import Shell
from tests.support.small_sweep import make_spec, run_here


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    monkeypatch.setattr(status, "WATCH_EVERY_S", 0.01)
    monkeypatch.setattr(status, "ASK_HEAD_EVERY_S", 0.0)
    folder = tmp_path / "store"
    return LocalStore(str(folder), folder)


def submitted(store: LocalStore) -> None:
    when = (datetime.now(UTC) - timedelta(seconds=40)).isoformat()
    record = {"id": "fimo-flowers-1", "address": "http://head:8265", "when": when, "beside": "x", "renamed": {}}
    store.put(keys.job("flowers", "fimo-flowers-1"), json.dumps(record).encode())


def test_a_submitted_job_that_has_not_begun_is_told_as_that(shell: Shell, store: LocalStore) -> None:
    submitted(store)
    ended = shell("status", f"{store.uri}/flowers")
    assert ended.code == 2
    assert "job fimo-flowers-1" in ended.err
    assert "was submitted 40 s ago and has not begun" in ended.err
    assert "no sweep" not in ended.err


def test_a_sweep_that_nobody_submitted_is_still_none(shell: Shell, store: LocalStore) -> None:
    for words in (["status"], ["status", "--watch"]):
        ended = shell(*words, f"{store.uri}/flowers")
        assert ended.code == 2
        assert "submitted" not in ended.err


def test_watching_waits_for_the_sweep_and_shows_it_when_it_comes(
    shell: Shell, store: LocalStore, beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(store)
    turns = []

    def state(sweep: Sweep) -> tuple[jobs.Job, str]:
        turns.append(1)
        if len(turns) == 3:
            run_here(make_spec(), beside, store)
        return jobs.recorded(sweep)[-1], "RUNNING"

    monkeypatch.setattr(jobs, "latest_state", state)
    ended = shell("status", "--watch", f"{store.uri}/flowers")
    assert ended.code == 0
    assert ended.out.splitlines()[-1] == "complete"
    assert len(turns) == 3


def test_watching_a_job_that_failed_at_its_start_points_to_its_logs(
    shell: Shell, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(store)
    monkeypatch.setattr(jobs, "latest_state", lambda sweep: (jobs.recorded(sweep)[-1], "FAILED"))
    ended = shell("status", "--watch", f"{store.uri}/flowers")
    assert ended.code == 1
    assert "job fimo-flowers-1 has ended (FAILED)" in ended.err
    assert f"`fimo logs {store.uri}/flowers` shows" in ended.err


def test_who_computes_a_sweep_already_is_named_before_a_second_job_joins(store: LocalStore) -> None:
    class Head:
        def get_job_status(self, number: str) -> object:
            return type("Status", (), {"value": {"fimo-flowers-1": "RUNNING"}[number]})

    submitted(store)
    sweep = open_sweep(f"{store.uri}/flowers")
    assert jobs._running(sweep, Head(), "http://head:8265") == ("job fimo-flowers-1",)
    assert jobs._running(sweep, Head(), "http://another:8265") == ()
    with Heartbeat(sweep) as heartbeat:
        heartbeat.follow(Course.of(1, 0, []))
        [driver] = jobs._running(sweep, Head(), "http://another:8265")
    assert driver.startswith("a driver on ")
