"""What is told of a sweep while another driver works on it: of the state before or of that after, never a mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fimo.orchestrator.run.gather import current_tables
from fimo.orchestrator.store import Entry, Store
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables.schemas import encode_table
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
