"""What a run leaves in a store that holds more than it asks for, or keeps nothing."""

from __future__ import annotations

import copy

from fimo.orchestrator.report.ending import complaints
from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.run import driver as runs
from fimo.orchestrator.run.driver import is_part_of
from fimo.orchestrator.run.places import in_process
from fimo.orchestrator.spec.spec import parse
from fimo.orchestrator.store import MemoryStore
from fimo.orchestrator.sweep.sweep import Sweep
from tests.support.small_sweep import SPEC, run_here


def with_seeds(seeds):
    return parse({**copy.deepcopy(SPEC), "seeds": seeds})


def held(store):
    return {e.key: store.get(e.key) for e in store.list("flowers/") if e.key.split("/")[1] in ("tables", "sweep.json")}


def test_fewer_seeds_leave_the_larger_sweeps_tables_and_show_their_own(beside):
    large, store, _ = run_here(with_seeds(4), beside)
    before, parts = held(store), [e.key for e in store.list("flowers/parts/")]
    small, _, _ = run_here(with_seeds(2), beside, store)
    assert held(store) == before
    assert [e.key for e in store.list("flowers/parts/")] == parts
    assert (small.exit_code, small.larger, small.written) == (0, True, {})
    assert set(small.gathered.tables["attribution"]["seeds"].to_pylist()) == {2}
    assert set(large.gathered.tables["attribution"]["seeds"].to_pylist()) == {4}
    assert "holds more than this spec asks for" in " ".join(complaints(small))
    assert not list(store.list("flowers/failed/"))


def test_fewer_removals_or_other_seeds_beside_them_are_told_apart(beside):
    _, store, _ = run_here(with_seeds(4), beside)
    sweep = Sweep(store, "flowers")

    def part_of(**other) -> bool:
        return is_part_of(resolve(parse({**copy.deepcopy(SPEC), "seeds": 4, **other}), beside).manifest, sweep)

    fewer = {"indices": list(resolve(with_seeds(1), beside).manifest.removals[0].indices)}
    assert part_of(removals=fewer)
    assert part_of(seeds={"first": 1, "count": 3})
    assert not part_of()
    assert not part_of(seeds=5)
    assert not part_of(seeds={"first": 1, "count": 4})
    assert not part_of(removals={"indices": [1, 2]}, seeds=5)


def test_replace_makes_the_sweep_smaller(beside):
    _, store, _ = run_here(with_seeds(4), beside)
    report = runs.run(resolve(with_seeds(2), beside), store, where=in_process, replace_other=True)
    assert not report.larger
    assert Sweep(store, "flowers").read_manifest().spec.seeds.count == 2


def test_a_larger_spec_that_begins_meanwhile_keeps_its_place(beside):
    store = MemoryStore()
    sweep, larger = Sweep(store, "flowers"), resolve(with_seeds(4), beside).manifest
    listener = runs.Listener(
        lambda plan, tasks: None, lambda task, result: sweep.write_manifest(larger), lambda line: None
    )
    report = runs.run(resolve(with_seeds(2), beside), store, listener, where=in_process)
    assert (report.exit_code, report.larger) == (0, True)
    assert sweep.read_manifest() == larger
    assert not list(store.list("flowers/tables/"))
    run_here(with_seeds(4), beside, store)
    _, other, _ = run_here(with_seeds(4), beside)
    assert {k: v for k, v in held(store).items() if "costs" not in k and "made-from" not in k} == {
        k: v for k, v in held(other).items() if "costs" not in k and "made-from" not in k
    }


class Losing(MemoryStore):
    """Takes parts and keeps none, as a bucket whose lifecycle rule deletes them."""

    def create(self, key: str, data: bytes) -> bool:
        return True if "/parts/" in key else super().create(key, data)


def test_shards_that_are_done_and_are_not_there_are_a_failure_with_its_reason(beside):
    report, _, _ = run_here(with_seeds(2), beside, Losing())
    assert report.exit_code == 1
    [line] = [line for line in complaints(report) if "cannot be used" in line]
    assert "the store does not list it" in line
    assert not any("computes them" in line for line in complaints(report)), "a resume would do the same again"
