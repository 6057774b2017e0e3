"""Tasks of several shards: handed over as one, trained in the same stacks, committed, failed and resumed one by one."""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fimo.orchestrator.resolve.at_hand import Own
from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.run import tasks
from fimo.orchestrator.run.claims import Claims, SharedTasks
from fimo.orchestrator.run.course import Course
from fimo.orchestrator.run.failures import task_id
from fimo.orchestrator.run.heartbeat import Heartbeat
from fimo.orchestrator.run.owed import current_plan, few_shards, to_hand_over
from fimo.orchestrator.run.places import Pool
from fimo.orchestrator.run.plan import seeds_together
from fimo.orchestrator.run.results import ApartError, Failed, Lost, Receipt
from fimo.orchestrator.run.schedule import APART, drive
from fimo.orchestrator.run.verification import verify
from fimo.orchestrator.run.work import EstimateTask, Shard, Together, as_work, task_name, tasks_in
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.store import MemoryStore
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers import joined
from fimo.workers.errors import StoreError
from tests.support.small_sweep import OWN, make_spec, run_here, table_bytes

TOGETHER = {"together": 3, "replicas": 64, "shard": 2, "replay": True}
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
    _, alone, _ = run_here(make_spec(further_training=FLOAT64, resources={"replicas": 64, "replay": True}), folder)
    together, expected = (parts_of(store, folder, SPEC) for store in (swept[0], alone))
    assert together.keys() == expected.keys()
    for key, part in together.items():
        np.testing.assert_allclose(part.deltas, expected[key].deltas, rtol=1e-9, atol=1e-12)
        assert part.removals == expected[key].removals
        named = part.provenance.get("together", [])
        assert [seed for seed, _ in named] == ([0, 1, 2] if part.seed < 3 else []), "a seed that is left over is alone"
        assert "several seeds together" in part.provenance["engine"]["path"]


def test_each_shard_is_told_of_once(swept):
    shards = [task for task in swept[1].tasks if isinstance(task, Shard)]
    assert len(shards) == len(set(shards)) == 12
    assert not any(isinstance(task, Together) for task in swept[1].tasks)
    assert sum(result.cells for result in swept[1].results if isinstance(result, Receipt)) == 20


def test_a_cell_is_verified_in_the_stack_that_it_was_part_of_or_held_to_the_noise_floor(folder, swept, monkeypatch):
    found = verify(Sweep(swept[0], "flowers"), rerun=4, own=Own(folder))
    assert [(r.exact, r.identical, r.ok) for r in found.reruns] == 4 * [(True, True, True)]
    monkeypatch.setattr("fimo.orchestrator.sweep.records.MOST_TOGETHER", 2)
    found = verify(Sweep(swept[0], "flowers"), rerun=3, own=Own(folder))
    assert [(r.exact, r.ok) for r in found.reruns] == [(r.seed == 3, True) for r in found.reruns]
    assert any(r.seed < 3 for r in found.reruns)


def test_what_is_trained_again_after_an_interruption_is_the_same_bytes(folder, swept):
    store, before = MemoryStore(), parts_of(swept[0], folder, SPEC)
    for entry in swept[0].list(""):
        if entry.key not in list(before)[::2]:
            store.put(entry.key, swept[0].get(entry.key))
    report, _, heard = run_here(SPEC, folder, store)
    assert report.exit_code == 0
    assert sum(isinstance(task, Shard) for task in heard.tasks) == 6
    after = parts_of(store, folder, SPEC)
    for key, part in after.items():
        assert np.array_equal(part.deltas, before[key].deltas)
        assert part.provenance.get("together") == before[key].provenance.get("together")
    assert table_bytes(store) == table_bytes(swept[0])


def test_beside_a_part_that_does_not_verify_what_is_lost_is_trained_in_the_stack_that_it_was_part_of(folder):
    """Of seeds 0 to 3 in one stack, the parts of 1 and 2 are torn, which shows when they are read, and 0 is gone."""
    spec = make_spec(seeds=4, estimators=[], resources={**TOGETHER, "together": 4, "shard": 5})
    _, store, _ = run_here(spec, folder)
    before, tables = parts_of(store, folder, spec), table_bytes(store)
    gone, *torn, whole = before
    assert before[gone].provenance["together"] == before[whole].provenance["together"]
    store.delete(gone)
    for key in torn:
        store.put(key, b"torn")
    report, _, _ = run_here(spec, folder, store)
    assert report.exit_code == 0
    after = parts_of(store, folder, spec)
    assert all(np.array_equal(part.deltas, before[key].deltas) for key, part in after.items())
    assert table_bytes(store) == tables


def test_what_a_task_committed_before_it_died_is_not_trained_again(folder, monkeypatch):
    spec = make_spec(resources={**TOGETHER, "together": 4, "replicas": 6})
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


def none(owed):
    """Nothing is done of any stack."""
    return ()


def test_shards_of_a_block_of_seeds_are_one_where_the_first_of_them_stood_and_other_tasks_stay():
    estimates = [EstimateTask("cg", "{}", ONE, first, 1) for first in range(3)]
    mixed = [estimates[0], SHARDS[0], estimates[1], SHARDS[1], estimates[2], *SHARDS[2:]]
    work = as_work(mixed, 3, 0, none)
    first, second = (Together(tuple(SHARDS[i : i + 3]), tuple(SHARDS[i : i + 3]), i) for i in (0, 3))
    assert work == [estimates[0], first, estimates[1], estimates[2], second, SHARDS[6]]
    assert sorted(map(repr, (task for one in work for task in tasks_in(one)))) == sorted(map(repr, mixed))
    assert as_work(mixed, 1, 0, none) == mixed
    assert as_work([], 4, 0, none) == []
    assert task_name(first) == "seeds 0 to 2, 1 removals each"


def test_what_is_done_of_an_interrupted_stack_is_trained_with_what_is_owed_of_it():
    """Of seeds 10 to 16, in blocks of three from 10 on, 10 and 12 were trained with 11, and 13 with others."""
    shards = [Shard(seed, ONE) for seed in (11, 14, 15, 16)]
    first, second, last = as_work(shards, 3, 10, lambda owed: {10, 12} if owed[0].seed == 11 else ())
    assert first == Together(tuple(Shard(seed, ONE) for seed in (10, 11, 12)), (shards[0],), 10)
    assert second == Together((shards[1], shards[2]), (shards[1], shards[2]), 13)
    assert last == shards[3]
    assert task_id_of(first) == task_id_of(replace(first, owed=first.shards)), "drivers that see more or less"


def test_shards_of_other_removals_are_no_mates():
    other = (NamedRemoval(1, "1", (1,)),)
    assert as_work([Shard(0, ONE), Shard(1, other)], 2, 0, none) == [Shard(0, ONE), Shard(1, other)]
    assert [len(one.owed) for one in as_work([Shard(s, r) for s in (0, 1) for r in (ONE, other)], 2, 0, none)] == [
        2,
        2,
    ]


def task_id_of(work):
    return task_id(SimpleNamespace(digest="d" * 32), work)


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
    return one if isinstance(task, Shard) else replace(one, cells=len(task.owed), each=(one,) * len(task.owed))


def test_shards_that_are_lost_together_are_in_the_end_tried_one_by_one():
    pool, told = Answers(lambda task: done(task) if isinstance(task, Shard) else Lost("out of memory")), []
    work = as_work(SHARDS, 7, 0, none)
    outcome = drive(work, pool, lambda task, result: told.append((task, type(result))), poll_s=0.0)
    assert [type(task) for task in pool.given] == [*[Together] * APART, *[Shard] * 7]
    assert len(outcome.receipts) == 7
    assert not outcome.set_aside
    assert [kind for _, kind in told] == [*[Lost] * APART, *[Receipt] * 7]


@pytest.mark.parametrize(("error", "tries"), [(StoreError("the server is busy"), 2), (ValueError("wrong"), 1)])
def test_shards_stay_together_after_a_store_that_failed_and_are_tried_apart_after_an_error_of_their_own(error, tries):
    pool = Answers(lambda task: Failed(error, "") if len(pool.given) <= tries else done(task))
    outcome = drive(as_work(SHARDS, 7, 0, none), pool, poll_s=0.0)
    apart = not isinstance(error, StoreError)
    assert [type(task) for task in pool.given] == [*[Together] * tries, *([Shard] * 7 if apart else [Together])]
    assert len(outcome.receipts) == 7
    assert not outcome.set_aside


def test_once_shards_cannot_be_trained_together_the_others_are_handed_over_one_by_one():
    pool = Answers(lambda task: done(task) if isinstance(task, Shard) else Failed(ApartError("one by one"), ""))
    work = as_work([Shard(seed, ONE) for seed in range(40)], 4, 0, none)
    outcome = drive(work, pool, poll_s=0.0)
    # Those that were handed over already are asked for nothing more.
    assert [isinstance(task, Together) for task in pool.given].count(True) <= 2
    assert len(outcome.receipts) == 40
    assert not outcome.set_aside


def test_drivers_that_each_set_a_shard_aside_do_not_wait_for_each_other(folder):
    """A block that is tried shard by shard is no longer claimed; its shards are."""
    manifest, store = resolve(make_spec(resources=TOGETHER), folder).manifest, MemoryStore()
    block = as_work(SHARDS[:3], 3, 0, none)[0]
    with contextlib.ExitStack() as both:
        sources = []
        for _ in range(2):
            sweep = Sweep(store, "flowers")
            heartbeat = both.enter_context(Heartbeat(sweep))
            heartbeat.follow(Course.of(3, 0, SHARDS[:3]))
            claims = both.enter_context(Claims(sweep, manifest, heartbeat))
            sources.append(SharedTasks([block], claims, lambda work: work))
        mine, others = sources
        assert mine.take(1) == [block]
        assert others.take(1) == []
        assert mine.split(block) == SHARDS[:3]
        for shard in SHARDS[:3]:
            mine.done(shard)
        deadline = time.monotonic() + 20
        while not (took := others.take(1)) and time.monotonic() < deadline:
            others._looked = 0.0
            time.sleep(0.05)
        assert took == [block]


def test_rows_of_another_stack_are_no_conflict(folder, monkeypatch):
    """Two drivers put seed 0 together otherwise, and neither knows of the other: the first one's part stands."""
    _, store, _ = run_here(make_spec(resources={"replicas": 64, "replay": True}), folder)
    right = tasks.shards.met
    monkeypatch.setattr(tasks.shards, "met", lambda *of: None)
    manifest = resolve(make_spec(resources=TOGETHER), folder).manifest
    sweep, before = Sweep(store, "flowers"), dict(parts_of(store, folder, make_spec()))
    [first, *_] = to_hand_over(manifest, Sweep(MemoryStore(), "flowers"), current_plan(manifest, None).shards)
    monkeypatch.setattr(joined, "_of_groups", moved(joined._of_groups))
    receipt = tasks.run_task(sweep, manifest, None, first)
    assert not receipt.written
    monkeypatch.setattr(tasks.shards, "met", right)
    assert all(np.array_equal(part.deltas, before[key].deltas) for key, part in parts_of(store, folder, SPEC).items())


def moved(of_groups):
    """As another stack rounds."""

    def rounded(*of):
        return [replace(result, deltas=result.deltas * (1 + 1e-7)) for result in of_groups(*of)]

    return rounded


def test_shards_that_are_done_together_are_told_of_one_by_one():
    pool, told = Answers(done), []
    work = as_work(SHARDS, 3, 0, none)
    outcome = drive(work, pool, lambda task, result: told.append((task, result.cells)), poll_s=0.0)
    assert told == [(shard, 1) for shard in SHARDS]
    assert len(outcome.receipts) == 7


# -- how many ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "removals", "expected"), [(0, 100, 1), (1, 100, 5), (1, 1000, 5), (1, 10, 46), (1, 1, 256)]
)
def test_a_gpu_is_filled_whatever_the_cluster(beside, gpus, removals, expected):
    manifest = resolve(make_spec(resources={"shard": "auto", "gpus": gpus}), beside).manifest
    assert seeds_together(manifest, removals) == expected
    assert seeds_together(replace(manifest, scalars=10**12), removals) == 1, "a dear cell is no cheaper together"
    assert seeds_together(replace(manifest, evals=10**8), removals) == 1, "their deltas would fill it"


def test_the_spec_says_how_many(beside):
    manifest = resolve(make_spec(resources={"together": 4}), beside).manifest
    assert seeds_together(manifest, 5) == 4
    assert make_spec().resources.together == "auto"


def test_a_large_cluster_is_told_that_it_has_few_tasks():
    assert few_shards(as_work(SHARDS, 3, 0, none), 4) is None
    line = few_shards(as_work(SHARDS, 3, 0, none), 8)
    assert line is not None
    assert "3 tasks for 8 places, of up to 3 seeds each" in line
    assert "{together}" in line
