"""Tasks of several shards: handed over as one, trained in the same stacks, committed, failed and resumed one by one."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from fimo.orchestrator.resolve.at_hand import Own
from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.run.places import Failed, Lost, Pool
from fimo.orchestrator.run.plan import EstimateTask, Shard, Together, as_work, shards_together, task_name, tasks_in
from fimo.orchestrator.run.schedule import drive
from fimo.orchestrator.run.tasks import Receipt
from fimo.orchestrator.run.verification import verify
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.store import MemoryStore
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers import joined
from tests.support.small_sweep import OWN, make_spec, run_here

TOGETHER = {"together": 3, "replicas": 64, "shard": 2}
FLOAT64 = {"precision": "float64", "removal_mode": "reweight"}


def parts_of(store, beside, spec):
    manifest = resolve(spec, beside).manifest
    sweep = Sweep(store, "flowers")
    return {part.key: sweep.read_part(part.key, manifest) for part in sweep.list_parts(manifest.digest)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together") / "spec"
    shutil.copytree(OWN, folder)
    return folder


SPEC = make_spec(further_training=FLOAT64, resources={**TOGETHER, "proof": True})


@pytest.fixture(scope="module")
def swept(folder):
    report, store, heard = run_here(SPEC, folder)
    assert report.exit_code == 0
    return store, heard


def test_the_parts_are_those_of_shards_alone_and_say_with_which_they_were_trained(folder, swept):
    _, alone, _ = run_here(make_spec(further_training=FLOAT64, resources={"replicas": 64}), folder)
    together, expected = (parts_of(store, folder, SPEC) for store in (swept[0], alone))
    assert together.keys() == expected.keys()
    for key, part in together.items():
        np.testing.assert_allclose(part.deltas, expected[key].deltas, rtol=1e-9, atol=1e-12)
        assert part.removals == expected[key].removals
        assert len(part.provenance["together"]) == 3
        assert "several seeds together" in part.provenance["engine"]["path"]


def test_each_shard_is_told_of_once(swept):
    shards = [task for task in swept[1].tasks if isinstance(task, Shard)]
    assert len(shards) == len(set(shards)) == 12
    assert not any(isinstance(task, Together) for task in swept[1].tasks)
    assert sum(result.cells for result in swept[1].results if isinstance(result, Receipt)) == 20


def test_a_cell_is_verified_in_the_stack_that_it_was_part_of_or_held_to_the_noise_floor(folder, swept, monkeypatch):
    found = verify(Sweep(swept[0], "flowers"), rerun=4, own=Own(folder))
    assert [(r.exact, r.identical, r.ok) for r in found.reruns] == 4 * [(True, True, True)]
    monkeypatch.setattr("fimo.orchestrator.run.rerun.MOST_TOGETHER", 2)
    found = verify(Sweep(swept[0], "flowers"), rerun=2, own=Own(folder))
    assert [(r.exact, r.ok) for r in found.reruns] == 2 * [(False, True)]


def test_what_is_trained_again_after_an_interruption_is_put_together_otherwise(folder, swept):
    store, before = MemoryStore(), parts_of(swept[0], folder, SPEC)
    for entry in swept[0].list(""):
        if entry.key not in list(before)[::2]:
            store.put(entry.key, swept[0].get(entry.key))
    report, _, heard = run_here(SPEC, folder, store)
    assert report.exit_code == 0
    assert sum(isinstance(task, Shard) for task in heard.tasks) == 6
    after = parts_of(store, folder, SPEC)
    assert any(after[key].provenance["together"] != part.provenance["together"] for key, part in before.items())
    for key, part in after.items():
        np.testing.assert_allclose(part.deltas, before[key].deltas, rtol=1e-9, atol=1e-12)


def test_what_a_task_committed_before_it_died_is_not_trained_again(folder, monkeypatch):
    spec = make_spec(resources={**TOGETHER, "together": 12, "replicas": 20})
    right, stacks = joined._together, []

    def dies_in_the_second(start, shards):
        stacks.append(len(shards))
        if len(stacks) == 2:
            raise RuntimeError("the node is gone")
        return right(start, shards)

    monkeypatch.setattr(joined, "_together", dies_in_the_second)
    report, store, heard = run_here(spec, folder)
    assert report.exit_code == 0
    assert len(parts_of(store, folder, spec)) == 12
    written = [result.written for result in heard.results if isinstance(result, Receipt) and result.cells]
    assert (written.count(False), written.count(True)) == (stacks[0], 12 - stacks[0])
    [failed] = [task for task, result in zip(heard.tasks, heard.results, strict=True) if isinstance(result, Failed)]
    assert isinstance(failed, Together)


def test_a_shard_that_fails_is_set_aside_alone_and_those_beside_it_are_done(folder, monkeypatch):
    alone, several = joined.run_shard, joined._together

    def wrong(seeds):
        if 2 in seeds:
            raise ValueError("seed 2 is wrong")

    def one(start, removals, seed, replicas):
        wrong([seed])
        return alone(start, removals, seed, replicas)

    def more(start, shards):
        wrong([seed for _, seed in shards])
        return several(start, shards)

    monkeypatch.setattr(joined, "run_shard", one)
    monkeypatch.setattr(joined, "_together", more)
    spec = make_spec(resources=TOGETHER)
    report, store, _ = run_here(spec, folder)
    assert report.exit_code == 1
    assert {part.seed for part in parts_of(store, folder, spec).values()} == {0, 1, 3}
    assert ["seed 2 is wrong" in failure.line for failure in report.failures.aside] == 3 * [True]


# -- handed over as one ------------------------------------------------------------------------------------------------

ONE = (NamedRemoval(0, "0", (0,)),)
SHARDS = [Shard(seed, ONE) for seed in range(7)]


def test_shards_are_one_where_the_first_of_them_stood_and_other_tasks_stay():
    estimates = [EstimateTask("cg", "{}", ONE, first, 1) for first in range(3)]
    mixed = [estimates[0], SHARDS[0], estimates[1], SHARDS[1], estimates[2], *SHARDS[2:]]
    work = as_work(mixed, 3)
    assert work == [
        estimates[0],
        Together(tuple(SHARDS[:3])),
        estimates[1],
        estimates[2],
        Together(tuple(SHARDS[3:6])),
        SHARDS[6],
    ]
    assert sorted(map(repr, (task for one in work for task in tasks_in(one)))) == sorted(map(repr, mixed))
    assert as_work(mixed, 1) == mixed
    assert as_work([], 4) == []
    assert task_name(work[1]) == "seeds 0 to 2, 3 removals in 3 shards"


class Answers(Pool):
    """Answers with what ``answer`` makes of the work, one at a time."""

    def __init__(self, answer):
        self.answer, self.flying, self.given = answer, {}, []

    def submit(self, task):
        self.given.append(task)
        self.flying[len(self.given)] = task
        return len(self.given)

    def wait(self, timeout_s):
        handle = min(self.flying)
        return [(handle, self.answer(self.flying.pop(handle)))]

    def cancel(self, handle):
        self.flying.pop(handle, None)

    def slots(self):
        return 1


def done(task):
    one = Receipt("key", True, 1, 0, 0.01, "cpu")
    return one if isinstance(task, Shard) else replace(one, cells=len(task.shards), each=(one,) * len(task.shards))


def test_shards_that_are_lost_together_are_tried_so_once_more_and_then_one_by_one():
    pool, told = Answers(lambda task: done(task) if isinstance(task, Shard) else Lost("out of memory")), []
    outcome = drive(as_work(SHARDS, 7), pool, lambda task, result: told.append((task, type(result))), poll_s=0.0)
    assert [type(task) for task in pool.given] == [Together, Together, *[Shard] * 7]
    assert len(outcome.receipts) == 7
    assert not outcome.set_aside
    assert [kind for _, kind in told] == [Lost, Lost, *[Receipt] * 7]


def test_shards_that_are_done_together_are_told_of_one_by_one():
    pool, told = Answers(done), []
    outcome = drive(as_work(SHARDS, 3), pool, lambda task, result: told.append((task, result.cells)), poll_s=0.0)
    assert told == [(shard, 1) for shard in SHARDS]
    assert len(outcome.receipts) == 7


# -- how many ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "shards", "slots", "expected"),
    [
        (0, 100, 2, 1),  # without a GPU each is by itself
        (1, 100, 1, 20),  # five tasks, of no more than 2048 replicas
        (1, 100, 4, 5),  # as many as fill a GPU
        (1, 100, 40, 3),  # no place is left without
        (1, 100, 1000, 1),
        (1, 10, 1, 5),  # few: full stacks rather than five tasks
        (1, 100_000, 8, 20),
        (1, 0, 1, 1),
        (1, 100, 0, 20),  # a cluster that has no node yet
    ],
)
def test_a_gpu_is_filled_and_every_gpu_has_work(beside, gpus, shards, slots, expected):
    manifest = resolve(make_spec(resources={"shard": "auto", "gpus": gpus}), beside).manifest
    manifest = replace(manifest, removals=tuple(NamedRemoval(i, str(i), (i,)) for i in range(100)))
    assert shards_together(manifest, shards, slots) == expected
    assert shards_together(replace(manifest, scalars=10**12), shards, slots) == 1, "a dear cell is no cheaper together"


def test_the_spec_says_how_many():
    manifest = make_spec(resources={"together": 4}).resources
    assert manifest.together == 4
    assert make_spec().resources.together == "auto"
