"""What is told of a sweep while another driver works on it: of the state before or of that after, never a mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fimo.orchestrator.run.gather import current_tables
from fimo.orchestrator.run.status import sweep_status
from fimo.orchestrator.run.verification import verify
from fimo.orchestrator.spec.spec import Spec
from fimo.orchestrator.store import Entry, MemoryStore, Store
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables.schemas import encode_table
from tests.faults.faulty import Killed
from tests.support.small_sweep import copied, make_spec, run_here

Tables = dict[str, bytes]


class Meanwhile:
    """A store in which something happens before its reader's operation of a number, once."""

    def __init__(self, store: Store, at: int, happens: Callable[[], object]) -> None:
        self.uri, self.store, self.at, self.happens, self.done = store.uri, store, at, happens, 0

    def _count(self) -> None:
        self.done += 1
        if self.done == self.at:
            self.happens()

    def get(self, key: str) -> bytes:
        self._count()
        return self.store.get(key)

    def list(self, prefix: str) -> Iterator[Entry]:
        self._count()
        return self.store.list(prefix)

    def create(self, key: str, data: bytes) -> bool:
        raise AssertionError("a reader writes nothing")

    def put(self, key: str, data: bytes) -> None:
        raise AssertionError("a reader writes nothing")

    def delete(self, key: str) -> None:
        raise AssertionError("a reader writes nothing")

    def check(self) -> None:
        raise AssertionError("a reader writes nothing")


def pulled(store: Store) -> tuple[Tables, bool]:
    """The tables but costs, and whether they are complete."""
    sweep = Sweep(store, "flowers")
    tables, complete = current_tables(sweep, sweep.read_manifest())
    return {name: encode_table(table) for name, table in tables.items() if name != "costs"}, complete


@pytest.mark.parametrize("finished", [True, False])
def test_tables_that_are_read_while_a_driver_adds_seeds_are_all_of_one_state(finished: bool, beside: Path) -> None:
    turns = iter(["go on"] * 2)
    of = {"should_stop": lambda: None if finished or next(turns, None) else "stopped"}
    small, large = make_spec(seeds=2), make_spec(seeds=2 if not finished else 3)
    report, before, _ = run_here(small, beside, **of)
    assert report.exit_code == (0 if finished else 3)
    after = copied(before)
    run_here(large, beside, after)
    states = [pulled(before), pulled(after)]
    look = Meanwhile(before, 0, lambda: None)
    pulled(look)
    for at in range(1, look.done + 1):
        store = copied(before)
        found, complete = pulled(Meanwhile(store, at, lambda store=store: run_here(large, beside, store)))
        # The tables of the whole sweep may be met before it is known to be whole; not the other way round.
        assert found in [tables for tables, whole in states if whole or not complete], at


class Deadly(MemoryStore):
    """A store whose driver is killed before a write of a number, but for what says that it lives."""

    left = 10**9

    def _count(self, key: str) -> None:
        self.left -= not key.startswith(("flowers/drivers/", "flowers/claims/"))
        if self.left < 0:
            raise Killed

    def create(self, key: str, data: bytes) -> bool:
        self._count(key)
        return super().create(key, data)

    def put(self, key: str, data: bytes) -> None:
        self._count(key)
        super().put(key, data)

    def delete(self, key: str) -> None:
        self._count(key)
        super().delete(key)


def killed(spec: Spec, beside: Path, start: Store) -> Iterator[MemoryStore]:
    """What a run leaves of a sweep that is killed at its first write, its second, and so on."""
    at, ended = 0, False
    while not ended:
        store = Deadly()
        for entry in list(start.list("")):
            store.put(entry.key, start.get(entry.key))
        store.left = at
        try:
            ended = bool(run_here(spec, beside, store))
        except Killed:
            yield copied(store)
        at += 1


@pytest.mark.parametrize("again", [False, True])
def test_a_sweep_that_adds_seeds_is_not_told_to_be_complete_at_fewer(again: bool, beside: Path) -> None:
    spec = make_spec(seeds={"until_reliability": 0.9, "min": 2, "max": 8}, estimators=[])
    report, whole, _ = run_here(spec, beside)
    assert report.exit_code == 0
    ended, rounds = pulled(whole), set()
    for left in killed(spec, beside, whole if again else MemoryStore()):
        sweep = Sweep(left, "flowers")
        if not any(left.list("flowers/sweep.json")):
            continue
        rounds.add(sweep.read_manifest().spec.seeds.count)
        tables, complete = pulled(left)
        assert not complete or tables == ended[0]
        codes = sweep_status(sweep)["exit_code"], verify(sweep).exit_code
        assert codes == ((0, 0) if complete else (3, 3))
        assert sweep_status(sweep)["resumable"] is not complete
    assert len(rounds) > 1 or again


def test_a_smaller_sweep_that_adds_seeds_leaves_the_larger_one_s_manifest(beside: Path) -> None:
    grows = {"until_reliability": 0.9, "min": 2, "max": 8}
    _, store, _ = run_here(make_spec(seeds=grows, estimators=[]), beside)
    before = store.get("flowers/sweep.json")
    report, _, _ = run_here(make_spec(seeds=grows, estimators=[], removals={"indices": [0, 3, 5]}), beside, store)
    assert (report.exit_code, report.larger) == (0, True)
    assert store.get("flowers/sweep.json") == before


def test_a_sweep_that_lacks_its_witnesses_does_not_verify_as_complete(beside: Path) -> None:
    _, store, _ = run_here(make_spec(resources={"witnesses": 1}), beside)
    assert verify(Sweep(store, "flowers")).exit_code == 0
    [witness] = store.list("flowers/witnesses/")
    store.delete(witness.key)
    found = verify(Sweep(store, "flowers"))
    assert (found.exit_code, found.witnesses) == (3, 1)
