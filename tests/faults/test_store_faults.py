"""A store that fails, or a process that ends, at random moments of an in-process sweep: 4 faults a run."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fimo.orchestrator.resolve.resolved import Resolved
from fimo.orchestrator.run import heartbeat
from fimo.orchestrator.run.places import LocalPool
from fimo.orchestrator.run.results import Receipt, Result
from fimo.orchestrator.run.schedule import drive
from fimo.orchestrator.run.work import Shard
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.store import MemoryStore, Store
from fimo.orchestrator.sweep import keys
from fimo.workers import joined
from fimo.workers.errors import FimoError, StoreError
from fimo.workers.shard import ShardResult, run_shard
from tests.faults import sweeps
from tests.faults.faulty import KINDS, FaultyStore, Killed

CELLS = 15
FAULTS = 4


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Resolved:
    return sweeps.resolved(sweeps.write_project(tmp_path_factory.mktemp("project")))


@pytest.fixture(scope="module")
def undisturbed(problem: Resolved) -> dict[str, bytes]:
    store = MemoryStore()
    assert sweeps.run_here(problem, store).exit_code == 0
    return sweeps.tables(store)


class Watch:
    """Stands in for ``run_shard``: refuses to compute what is committed already."""

    def __init__(self, store: Store, digest: str) -> None:
        self.store, self.digest = store, digest
        self.computed = 0

    def __call__(self, problem: Any, removals: Sequence[tuple[int, ...]], seed: int, replicas: int) -> ShardResult:
        numbered = [NamedRemoval(i[0] // 4, "", i) for i in removals]
        key = keys.part("tiny", self.digest, seed, numbered)
        assert key not in sweeps.part_keys(self.store), f"{key} is committed and computed again"
        self.computed += 1
        return run_shard(problem, removals, seed, replicas)


def try_to_run(problem: Resolved, store: Store) -> bool:
    """A run as from a shell; True if it ended by itself with everything done."""
    try:
        return sweeps.run_here(problem, store, retry_failed=True).exit_code == 0
    except (FimoError, Killed):
        return False


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("where", ["memory", "local"])
def test_no_fault_of_the_store_or_end_of_the_process_changes_a_table(
    problem: Resolved,
    undisturbed: dict[str, bytes],
    where: str,
    seed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = Random(f"{where} {seed}")
    inner: Store = MemoryStore() if where == "memory" else sweeps.folder_store(tmp_path / "store")
    watch = Watch(inner, problem.manifest.digest)
    monkeypatch.setattr(joined, "run_shard", watch)
    # An undisturbed run takes about 90 operations; a fault may make more of them.
    moments = sorted(random.sample(range(80), FAULTS))
    store = FaultyStore(inner, {moment: random.choice(KINDS) for moment in moments})
    finished = False
    while store.done < FAULTS or not finished:
        before = sweeps.objects(inner)
        finished = try_to_run(problem, store)
        sweeps.check_kept(inner, before)
        assert store.operations < 2000
    assert store.done == FAULTS
    sweeps.check_sound(inner, undisturbed, CELLS)
    assert watch.computed >= 6


def damaged(data: bytes, how: str, other: bytes) -> bytes:
    flipped = bytearray(data)
    flipped[60] ^= 1  # among the rows; what lies beside them is no part of their digest
    return {
        "torn": data[: len(data) // 2],
        "empty": b"",
        "foreign": b"PAR1 and nothing else PAR1",
        "pickle": b"\x80\x04\x95\x10\x00\x00\x00cposix\nsystem\n.",
        "flipped": bytes(flipped),
        "another's": other,
    }[how]


@pytest.mark.parametrize("how", ["torn", "empty", "foreign", "pickle", "flipped", "another's"])
@pytest.mark.parametrize("folder", ["parts", "estimates"])
def test_a_damaged_object_is_set_aside_and_computed_again(
    problem: Resolved, undisturbed: dict[str, bytes], folder: str, how: str
) -> None:
    store = MemoryStore()
    sweeps.run_here(problem, store)
    keys = [e.key for e in store.list(f"tiny/{folder}/")]
    other = next(e.key for e in store.list("tiny/parts/") if e.key != keys[0])
    bad = damaged(store.get(keys[0]), how, store.get(other))
    store.put(keys[0], bad)
    lines: list[str] = []
    assert sweeps.run_here(problem, store, say=lines.append).exit_code == 0
    sweeps.check_sound(store, undisturbed, CELLS)
    rejected = [e.key for e in store.list("tiny/rejected/")]
    assert len(rejected) == 1
    assert store.get(rejected[0]) == bad
    assert sum("set aside" in line for line in lines) == 1


@pytest.mark.parametrize("write", range(2, 12))
def test_a_full_disk_stops_in_one_line_and_what_was_written_stays(
    problem: Resolved,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: int,
) -> None:
    store = sweeps.folder_store(tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full_after(write))
        try:
            report = sweeps.run_here(problem, store)
            told = [failure.line for failure in report.failures.aside] + [report.outcome.stopped or ""]
        except StoreError as error:
            told = [str(error)]
    assert any("disk is full" in line for line in told)
    assert all("\n" not in line for line in told)
    before = sweeps.objects(store)
    assert sweeps.run_here(problem, store, retry_failed=True).exit_code == 0
    sweeps.check_kept(store, before)
    sweeps.check_sound(store, undisturbed, CELLS)


def full_after(writes: int) -> Callable[..., int]:
    """``os.write`` of a disk that is full from then on, with half of the last write on it."""
    real, count = os.write, [0]

    def write(file: int, data: bytes) -> int:
        count[0] += 1
        if count[0] > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data[: max(1, len(data) // 2)] if count[0] == writes else data)

    return write


def test_a_shard_that_always_fails_is_set_aside_with_its_traceback_and_the_rest_goes_on(
    problem: Resolved, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, tries = MemoryStore(), []

    def broken(problem: Any, removals: Sequence[tuple[int, ...]], seed: int, replicas: int) -> ShardResult:
        if seed == 1 and removals[0] == (0,):
            tries.append(seed)
            raise RuntimeError("planned: this shard has a bug")
        return run_shard(problem, removals, seed, replicas)

    with monkeypatch.context() as patch:
        patch.setattr(joined, "run_shard", broken)
        report = sweeps.run_here(problem, store)
    assert report.exit_code == 1
    assert len(tries) == 3
    assert len(sweeps.part_keys(store)) == 5
    [record] = [store.get(e.key) for e in store.list("tiny/failed/")]
    assert b"planned: this shard has a bug" in record
    assert b"in broken" in record
    # Left alone until asked for; then computed.
    assert sweeps.run_here(problem, store).exit_code == 1
    assert len(sweeps.part_keys(store)) == 5
    assert sweeps.run_here(problem, store, retry_failed=True).exit_code == 0
    sweeps.check_sound(store, undisturbed, CELLS)


def test_a_bug_in_every_shard_stops_the_sweep_early(problem: Resolved, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def broken(*arguments: object) -> ShardResult:
        tries.append(1)
        raise RuntimeError("planned: every shard has it")

    monkeypatch.setattr(joined, "run_shard", broken)
    report = sweeps.run_here(problem, store := MemoryStore())
    assert report.exit_code == 1
    assert report.outcome.broken
    assert "planned: every shard has it" in (report.outcome.stopped or "")
    assert len(tries) <= 9 + 3
    assert not sweeps.part_keys(store)


def test_two_drivers_taking_turns_compute_each_shard_once(
    problem: Resolved, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second driver runs to its end while the first is frozen, which then finds all done."""
    monkeypatch.setattr(heartbeat, "SILENT_S", -1.0)
    store = MemoryStore()
    watch = Watch(store, problem.manifest.digest)
    first = [True]

    def interrupted(*arguments: Any) -> ShardResult:
        if first.pop() if first else False:
            assert sweeps.run_here(problem, store).exit_code == 0
            # What the first driver had begun is computed twice, and its commit finds the same rows.
            return run_shard(*arguments)
        return watch(*arguments)

    monkeypatch.setattr(joined, "run_shard", interrupted)
    assert sweeps.run_here(problem, store).exit_code == 0
    assert watch.computed == 6
    sweeps.check_sound(store, undisturbed, CELLS)


class Expiring(FaultyStore):
    """Takes a number of parts, then refuses every write, as S3 does when a session's credentials expire."""

    def __init__(self, inner: Store, parts: int) -> None:
        super().__init__(inner, {})
        self.parts = parts

    def create(self, key: str, data: bytes) -> bool:
        if "/parts/" in key:
            self.parts -= 1
            if self.parts < 0:
                raise StoreError("store x: its credentials have expired: renew them, then run `fimo resume`")
        return self.inner.create(key, data)


@pytest.mark.parametrize("parts_taken", [0, 1, 3])
def test_expired_credentials_end_the_run_before_every_shard_is_trained_in_vain(
    problem: Resolved, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, parts_taken: int
) -> None:
    inner = MemoryStore()
    watch = Watch(inner, problem.manifest.digest)
    monkeypatch.setattr(joined, "run_shard", watch)
    report = sweeps.run_here(problem, Expiring(inner, parts_taken))
    assert report.exit_code == 3
    assert "credentials have expired" in (report.outcome.stopped or "")
    assert report.failures.aside == ()
    assert watch.computed == parts_taken + 3
    assert len(sweeps.part_keys(inner)) == parts_taken
    assert sweeps.run_here(problem, inner).exit_code == 0
    sweeps.check_sound(inner, undisturbed, CELLS)


class Empty(LocalPool):
    """A cluster whose nodes come after a while: until then nothing runs, however long it is asked."""

    def __init__(self, turns: int) -> None:
        super().__init__(lambda task: Receipt(str(task), True, 1, 0, 0.1, "x"))
        self.turns, self.cancelled = turns, 0

    def wait(self, timeout_s: float) -> list[tuple[Hashable, Result]]:
        if self.turns > 0:
            self.turns -= 1
            time.sleep(0.005)
            return []
        return super().wait(timeout_s)

    def cancel(self, handle: Hashable) -> None:
        self.cancelled += 1
        super().cancel(handle)

    def slots(self) -> int:
        return 0 if self.turns else 1


def test_a_deadline_does_not_run_while_there_is_no_node() -> None:
    """A group of spot nodes starts from none, and may be reclaimed whole."""
    pool = Empty(turns=40)
    outcome = drive([Shard(seed, ()) for seed in range(4)], pool, deadline_s=0.05, poll_s=0.0)
    assert len(outcome.receipts) == 4
    assert (outcome.lost, pool.cancelled) == (0, 0)
