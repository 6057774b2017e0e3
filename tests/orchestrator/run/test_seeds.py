"""Sweeps that add seeds by themselves, and the number of seeds that a sweep needs, from its store."""

from __future__ import annotations

import pytest

from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.run.seeds import needed_seeds
from fimo.orchestrator.run.work import EstimateTask, Shard
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.errors import UsageError
from tests.support.small_sweep import make_spec, run_here, table_bytes

GROWS = {"until_reliability": 0.9, "min": 2, "max": 12}


def seeds_of(store) -> dict:
    return Sweep(store, "flowers").read_manifest().json()["spec"]["seeds"]


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    import shutil

    from tests.support.small_sweep import OWN

    beside = tmp_path_factory.mktemp("grown") / "spec"
    shutil.copytree(OWN, beside)
    return beside, *run_here(spec(), beside)


def spec(**changes):
    return make_spec(seeds=GROWS, estimators=["grad_dot", {"name": "unrolled", "seeds": 2}], **changes)


def test_seeds_are_added_in_rounds_until_the_attribution_is_reliable(grown):
    _, report, store, heard = grown
    chosen = seeds_of(store)
    assert report.exit_code == 0
    assert 2 < chosen["count"] <= 12
    assert chosen == {"first": 0, **GROWS, "count": chosen["count"]}
    said = [line for line in heard.lines if "not yet reliable to 0.9" in line]
    assert said
    assert report.gathered.cells == report.gathered.done == 5 * chosen["count"]
    rows = [r for r in report.gathered.tables["reliability"].to_pylist() if r["measured"] and r["adjust"] == "baseline"]
    assert {r["seeds"] for r in rows} == {chosen["count"]}
    if chosen["count"] < 12:
        assert min(r["reliability"] for r in rows) > 0.8


def test_estimates_wait_for_the_number_and_have_seeds_that_it_never_comes_to(grown):
    _, _, _, heard = grown
    kinds = [type(task) for task in heard.tasks]
    assert Shard not in kinds[kinds.index(EstimateTask) :]
    assert {task.seed for task in heard.tasks if isinstance(task, EstimateTask)} == {None, 12, 13}


def test_the_choice_is_made_again_and_nothing_computed_twice(grown):
    beside, _, store, _ = grown
    before, chosen = table_bytes(store), seeds_of(store)
    report, _, heard = run_here(spec(), beside, store)
    assert report.exit_code == 0
    assert heard.tasks == []
    assert (table_bytes(store), seeds_of(store)) == (before, chosen)


def test_a_sweep_that_was_stopped_in_any_round_comes_to_the_same(grown):
    beside, _, store, heard = grown
    tasks = len(heard.tasks)
    for stop_after in (1, tasks // 2, tasks - 1):
        told: list[object] = []

        def stop(told=told, most=stop_after):
            told.append(None)
            return "stopped" if len(told) > most else None

        interrupted, other, _ = run_here(spec(), beside, should_stop=stop)
        assert interrupted.exit_code == 3
        resumed, _, _ = run_here(spec(), beside, other)
        assert resumed.exit_code == 0
        assert seeds_of(other) == seeds_of(store)
        assert table_bytes(other) == table_bytes(store)


def test_estimates_alone_leave_the_seeds_that_were_added_in_the_tables(grown):
    beside, first, store, _ = grown
    before, chosen = table_bytes(store), seeds_of(store)
    report, _, heard = run_here(spec(), beside, store, shards=False)
    assert report.exit_code == 0
    assert heard.tasks == []
    assert report.gathered.cells == first.gathered.cells
    assert (table_bytes(store), seeds_of(store)) == (before, chosen)


def test_a_torn_part_is_computed_again_before_more_seeds_are_added(grown):
    beside, _, store, _ = grown
    before, chosen = table_bytes(store), seeds_of(store)
    key = next(e.key for e in store.list("flowers/parts/"))
    whole = store.get(key)
    store.put(key, whole[: len(whole) // 2])
    report, _, heard = run_here(spec(), beside, store)
    assert report.exit_code == 0
    assert sum(isinstance(task, Shard) for task in heard.tasks) == 1
    assert (table_bytes(store), seeds_of(store)) == (before, chosen)


def test_the_seeds_that_a_sweep_needs_are_told_from_its_store(grown):
    _, _, store, _ = grown
    sweep = Sweep(store, "flowers")
    few, many = (needed_seeds(sweep, target, None)["wanted"]["baseline"] for target in (0.5, 0.99))
    assert few < many
    found = needed_seeds(sweep, None, 1e-3)
    assert set(found["wanted"]) == {"sem"}
    assert found["device_hours"]["sem"] >= 0
    assert [row["step"] for row in found["steps"]] == [3, 6, 9, 10]


def test_one_seed_says_nothing_of_how_many_are_needed(beside):
    _, store, _ = run_here(make_spec(seeds=1), beside)
    with pytest.raises(UsageError, match="has 1 whole seed: two at least"):
        needed_seeds(Sweep(store, "flowers"), 0.95, None)


def test_a_sweep_of_fixed_seeds_keeps_its_digests(beside):
    fixed, grows = (resolve(make_spec(seeds=s), beside).manifest for s in (4, {**GROWS, "min": 4}))
    assert fixed.digest == grows.digest
