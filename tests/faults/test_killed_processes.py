"""SIGKILL of shard processes (at any instruction, and in the middle of a commit) and of whole drivers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from fimo.orchestrator.resolve.resolved import Resolved
from fimo.orchestrator.store import MemoryStore
from tests.faults import sweeps
from tests.faults.faulty import die_after, die_at_commit, forked, in_fork

CELLS = 15


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Resolved:
    return sweeps.resolved(sweeps.write_project(tmp_path_factory.mktemp("project")))


@pytest.fixture(scope="module")
def undisturbed(problem: Resolved) -> dict[str, bytes]:
    store = MemoryStore()
    assert sweeps.run_here(problem, store).exit_code == 0
    return sweeps.tables(store)


class Chances:
    """Kills the first tries of a number of tasks, each at another moment."""

    def __init__(self, dooms: list[Callable[[], None]]) -> None:
        self.dooms = dooms

    def __call__(self) -> Callable[[], None] | None:
        return self.dooms.pop() if self.dooms else None


COMMITS = [(name, number, before) for name, number in (("fsync", 1), ("link", 1)) for before in (True, False)]


@pytest.mark.parametrize("seed", range(4))
def test_shard_processes_killed_mid_shard_lose_nothing(
    problem: Resolved, undisturbed: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    random = Random(seed)
    store = sweeps.folder_store(tmp_path / "store")
    chances = Chances([die_after(random.uniform(0.0, 0.03)) for _ in range(6)])
    report = sweeps.run_here(problem, store, forked(chances))
    assert report.exit_code == 0
    assert not chances.dooms
    sweeps.check_sound(store, undisturbed, CELLS)


@pytest.mark.parametrize(("name", "number", "before"), COMMITS)
def test_shard_processes_killed_mid_commit_leave_whole_parts_or_none(
    problem: Resolved, undisturbed: dict[str, bytes], tmp_path: Path, name: str, number: int, before: bool
) -> None:
    store = sweeps.folder_store(tmp_path / "store")
    chances = Chances([die_at_commit(name, number, before) for _ in range(5)])
    report = sweeps.run_here(problem, store, forked(chances))
    # A task killed after its commit is not computed again: its second try has nothing to commit and lives.
    assert report.outcome.lost == (3 if (name, before) == ("link", False) else 5)
    assert report.exit_code == 0
    sweeps.check_sound(store, undisturbed, CELLS)


@pytest.mark.parametrize("seed", range(16))
def test_a_killed_driver_leaves_a_sweep_that_resumes(
    problem: Resolved, undisturbed: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    random = Random(seed)
    store = sweeps.folder_store(tmp_path / "store")
    kills = 0
    while kills < 2:
        before = sweeps.objects(store)
        ended = in_fork(lambda: sweeps.run_here(problem, store).exit_code, die_after(random.uniform(0.01, 0.25)))
        kills += ended is None
        sweeps.check_kept(store, before)
        if ended is not None:
            break
    before = sweeps.objects(store)
    assert sweeps.run_here(problem, store).exit_code == 0
    sweeps.check_kept(store, before)
    sweeps.check_sound(store, undisturbed, CELLS)


def test_two_drivers_at_once_make_the_tables_of_one(
    problem: Resolved, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    store = sweeps.folder_store(tmp_path / "store")
    started = time.time() + 0.2

    def both() -> int:
        time.sleep(max(0.0, started - time.time()))
        return sweeps.run_here(problem, store).exit_code

    first = os.fork()
    if first == 0:
        code = 1
        try:
            code = both()
        finally:
            os._exit(code)
    assert in_fork(both) == 0
    assert os.waitpid(first, 0)[1] == 0
    sweeps.check_sound(store, undisturbed, CELLS)
