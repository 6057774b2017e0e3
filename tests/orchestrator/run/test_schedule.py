"""The scheduling loop against a pool that fails as told."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest

from fimo.orchestrator.run import lateness
from fimo.orchestrator.run.lateness import Lateness
from fimo.orchestrator.run.places import Pool
from fimo.orchestrator.run.results import ConflictError, Failed, Lost, Receipt, UnableError
from fimo.orchestrator.run.schedule import ATTEMPTS, LOSSES, drive
from fimo.orchestrator.run.work import EstimateTask, Shard
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.workers.errors import StoreError, WorkloadError

ONE = (NamedRemoval(0, "0", (0,)),)


def shards(count: int) -> list[Shard]:
    return [Shard(seed, ONE) for seed in range(count)]


def receipt(task) -> Receipt:
    return Receipt("key", True, 0 if isinstance(task, EstimateTask) else 1, 0, 0.01, "cpu")


class FakePool(Pool):
    """Answers tasks by a script (task -> list of results, the last one repeated), in any order."""

    def __init__(self, script=None, slots=2, order=None) -> None:
        self.script, self._slots, self.order = script or {}, slots, order or random.Random(0)
        self.flying: dict[int, object] = {}
        self.count, self.most = 0, 0
        self.started: list[object] = []
        self.cancelled: list[object] = []

    def submit(self, task):
        self.count += 1
        self.flying[self.count] = task
        self.started.append(task)
        self.most = max(self.most, len(self.flying))
        return self.count

    def wait(self, timeout_s):
        ready = [h for h, t in self.flying.items() if self.script.get(t) != "never"]
        if not ready:
            return []
        handle = self.order.choice(ready)
        task = self.flying.pop(handle)
        answers = self.script.get(task)
        if answers is None:
            return [(handle, receipt(task))]
        return [(handle, answers.pop(0) if len(answers) > 1 else answers[0])]

    def cancel(self, handle):
        self.cancelled.append(self.flying.pop(handle))

    def slots(self):
        return self._slots


class Freezing(FakePool):
    """Two nodes of one slot each, one of which stops answering under its tasks, and is noticed or not."""

    def __init__(self, noticed=True, takes_s=0.01) -> None:
        super().__init__(slots=2)
        self.frozen, self.noticed, self.takes_s = set(), noticed, takes_s

    def wait(self, timeout_s):
        time.sleep(self.takes_s)
        live = [handle for handle in self.flying if handle not in self.frozen]
        if self.count >= 8 and not self.frozen:
            self.frozen, self._slots = set(live[:2]), 1 if self.noticed else 2
            live = live[2:]
        return [(live[0], receipt(self.flying.pop(live[0])))] if live else []


def own_error(error=None):
    return Failed(error or ValueError("boom"), "Traceback …")


def test_every_task_is_finished_once_within_a_bounded_window_in_order():
    pool = FakePool(slots=3)
    outcome = drive(shards(40), pool)
    assert len(outcome.receipts) == 40
    assert pool.most <= 6
    assert [t.seed for t in pool.started] == list(range(40))
    assert not outcome.set_aside
    assert outcome.stopped is None


def test_a_lost_task_is_queued_again_without_counting():
    tasks = shards(6)
    outcome = drive(tasks, FakePool({tasks[2]: [Lost("node died")] * (LOSSES - 1) + [receipt(tasks[2])]}))
    assert len(outcome.receipts) == 6
    assert outcome.lost == LOSSES - 1
    assert not outcome.set_aside


def test_a_task_that_kills_every_worker_does_not_circle_for_ever():
    tasks = shards(6)
    outcome = drive(tasks, FakePool({tasks[2]: [Lost("worker died")]}))
    assert [a.task for a in outcome.set_aside] == [tasks[2]]
    assert "worker died" in outcome.set_aside[0].line


def test_a_task_fails_three_times_before_it_is_set_aside_with_its_traceback_and_the_rest_goes_on():
    tasks = shards(12)
    pool = FakePool({tasks[5]: [own_error()], tasks[7]: [own_error(StoreError("slow")), receipt(tasks[7])]})
    outcome = drive(tasks, pool)
    assert Counter(pool.started)[tasks[5]] == ATTEMPTS
    assert [(a.task, a.line, a.traceback) for a in outcome.set_aside] == [(tasks[5], "ValueError: boom", "Traceback …")]
    assert len(outcome.receipts) == 11


@pytest.mark.parametrize("error", [WorkloadError("wrong"), ConflictError("other rows")])
def test_an_error_that_will_say_the_same_is_not_tried_again(error):
    tasks = shards(12)
    pool = FakePool({tasks[5]: [own_error(error)]})
    outcome = drive(tasks, pool)
    assert Counter(pool.started)[tasks[5]] == 1
    assert [a.line for a in outcome.set_aside] == [str(error)]


def test_a_bug_that_fails_every_shard_stops_the_sweep_early():
    tasks = shards(500)
    pool = FakePool({t: [own_error()] for t in tasks})
    outcome = drive(tasks, pool)
    assert outcome.broken
    assert "every shard fails: ValueError: boom" in str(outcome.stopped)
    assert len(pool.started) < 30


def test_one_shard_that_fails_alone_stops_too_rather_than_report_an_empty_sweep():
    [task] = shards(1)
    assert drive([task], FakePool({task: [own_error()]})).broken


def test_estimators_that_fail_do_not_open_the_breaker():
    estimates = [EstimateTask(f"e{i}", "{}", ONE, 0, 1) for i in range(5)]
    outcome = drive([*estimates, *shards(8)], FakePool({e: [own_error()] for e in estimates}))
    assert not outcome.broken
    assert len(outcome.receipts) == 8
    assert len(outcome.set_aside) == 5


def test_a_task_past_its_deadline_is_given_up_and_queued_again():
    tasks = shards(4)
    pool = FakePool({tasks[1]: "never"})
    turns = iter(range(10_000))

    def stop():
        return "enough" if next(turns) > 2000 else None

    outcome = drive(tasks, pool, should_stop=stop, deadline_s=0.0, poll_s=0.0)
    assert tasks[1] in pool.cancelled
    assert outcome.lost >= 1
    assert len(outcome.receipts) <= 3 or outcome.set_aside


def test_a_reason_to_stop_gives_up_what_is_in_flight():
    pool = FakePool()
    turns = iter([None] * 3 + ["SIGTERM"] * 9)
    outcome = drive(shards(50), pool, should_stop=lambda: next(turns))
    assert outcome.stopped == "SIGTERM"
    assert len(outcome.receipts) == 3
    assert not pool.flying


@pytest.mark.parametrize("seed", range(20))
def test_random_weather_loses_no_task(seed):
    weather = random.Random(seed)
    tasks = shards(30)
    script = {}
    for task in tasks[3:]:
        answers = [weather.choice([Lost("x"), own_error(), receipt(task)]) for _ in range(weather.randrange(4))]
        script[task] = [*answers, receipt(task)]
    outcome = drive(tasks, FakePool(script, slots=weather.randrange(1, 6), order=weather))
    finished, aside = len(outcome.receipts), len(outcome.set_aside)
    assert finished + aside == 30
    assert all(isinstance(a.task, Shard) for a in outcome.set_aside)


@pytest.mark.parametrize("noticed", [True, False])
def test_while_one_node_is_frozen_the_other_goes_on_and_gets_its_tasks_in_the_end(monkeypatch, noticed):
    monkeypatch.setattr(lateness, "STUCK_S", 0.05)
    monkeypatch.setattr(lateness, "LATE_S", 0.6)
    pool, when = Freezing(noticed), []
    began = time.monotonic()
    outcome = drive(shards(30), pool, lambda task, result: when.append((time.monotonic() - began, result)), poll_s=0.0)
    assert len(outcome.receipts) == 30
    assert outcome.lost == len(pool.cancelled) == 2
    early = [result for at, result in when if at < 0.55]
    assert len(early) >= 20, "the other node did not wait for the deadline"


def test_a_slow_node_is_given_longer_each_time_and_ends(monkeypatch):
    """A deadline that stayed as it is would give up the same task again and again."""
    monkeypatch.setattr(lateness, "LATE_S", 0.05)
    monkeypatch.setattr(lateness, "LATE", 0.0)
    monkeypatch.setattr(lateness, "LONGEST", 0.0)
    tasks = shards(3)

    class Slow(FakePool):
        def __init__(self) -> None:
            super().__init__()
            self.began = {}

        def wait(self, timeout_s):
            time.sleep(0.005)
            for handle, task in self.flying.items():
                since = self.began.setdefault(handle, time.monotonic())
                if task is not tasks[2] or time.monotonic() - since > 0.3:
                    return [(handle, receipt(self.flying.pop(handle)))]
            return []

    outcome = drive(tasks, Slow(), poll_s=0.0)
    assert len(outcome.receipts) == 3
    assert 2 <= outcome.lost <= 4


def test_the_deadline_of_a_kind_of_task_is_drawn_from_its_own_kind():
    late = Lateness(None)
    dear = EstimateTask("cg", "{}", ONE, 0, 1)
    assert late.limit(dear) is None
    late.finished(shards(1)[0], 30.0)
    assert late.limit(shards(1)[0]) == 300.0
    assert late.limit(dear) == 1800.0, "no estimate has ended yet"
    late.gave_up(shards(1)[0])
    assert late.limit(shards(1)[0]) == 600.0
    assert Lateness(7.0).limit(dear) == 7.0


def test_a_large_shard_after_small_ones_is_given_its_time():
    """Removals are added to a sweep and then seeds: shards of one removal, then shards of a hundred."""
    late = Lateness(None)
    for seed in range(5):
        late.finished(Shard(seed, ONE), 30.0)
    many = Shard(9, tuple(NamedRemoval(i, str(i), (i,)) for i in range(100)))
    assert late.limit(many) == 30000.0
    assert not late.is_stuck(many, 3000.0)
    assert late.is_stuck(Shard(9, ONE), 100.0)
    late.finished(many, 3000.0)
    assert late.limit(Shard(9, ONE)) == 4500.0, "what does not grow with the size is not given up for being small"


def test_what_was_there_already_says_nothing_of_how_long_the_work_takes(monkeypatch):
    monkeypatch.setattr(lateness, "LATE_S", 0.05)
    tasks = shards(12)

    class Slow(FakePool):
        """All but the last are found done; the last takes its time."""

        def wait(self, timeout_s):
            time.sleep(0.01)
            handle, task = next(iter(self.flying.items()))
            if task is tasks[-1] and self.began() < 0.4:
                return []
            del self.flying[handle]
            return [(handle, Receipt("key", task is tasks[-1], 1, 0, 0.001, "cpu"))]

        def began(self):
            self.since = getattr(self, "since", time.monotonic())
            return time.monotonic() - self.since

    outcome = drive(tasks, Slow(), poll_s=0.0)
    assert (len(outcome.receipts), outcome.lost) == (12, 0)


class OneBadNode(FakePool):
    """Two nodes, one of which can begin nothing; tasks that would go there go elsewhere once it is avoided."""

    def __init__(self, both=False) -> None:
        super().__init__(slots=2)
        self.avoided, self.both = set(), both

    def wait(self, timeout_s):
        handle, task = next(iter(self.flying.items()))
        del self.flying[handle]
        node = "bad" if self.both or (handle % 2 and "bad" not in self.avoided) else "good"
        if node == "bad":
            return [(handle, own_error(UnableError("node b: No module named 'theirs'", "bad")))]
        return [(handle, receipt(task))]

    def avoid(self, node):
        self.avoided.add(node)


def test_a_node_that_can_begin_nothing_is_avoided_and_no_task_is_set_aside_for_it():
    pool = OneBadNode()
    outcome = drive(shards(20), pool)
    assert len(outcome.receipts) == 20
    assert pool.avoided == {"bad"}
    assert not outcome.set_aside
    assert outcome.stopped is None


def test_if_no_node_can_begin_anything_the_run_stops_says_why_and_records_nothing():
    outcome = drive(shards(20), OneBadNode(both=True))
    assert outcome.broken
    assert outcome.stopped == "no task can begin: node b: No module named 'theirs'"
    assert not outcome.set_aside


def test_a_lost_head_ends_the_run_with_its_reason():
    class Headless(FakePool):
        def lost(self):
            return "the Ray head has not answered for 30 s" if self.count > 6 else None

    outcome = drive(shards(20), Headless())
    assert outcome.stopped == "the Ray head has not answered for 30 s"
    assert not outcome.broken


class OneSlowNode(FakePool):
    """Two slots, of which one keeps the last task; what its copy and it answer is told."""

    def __init__(self, late, copy=None) -> None:
        super().__init__(slots=2)
        self.late, self.copy, self.slow = late, copy, None

    def wait(self, timeout_s):
        time.sleep(0.01)
        for handle, task in list(self.flying.items()):
            if task.seed != 9:
                return [(handle, receipt(self.flying.pop(handle)))]
            self.slow = self.slow or handle
            if handle != self.slow and self.copy is not None:
                self.flying.pop(handle)
                return [(handle, self.copy)]
            if handle == self.slow and self.late is not None and self.started.count(task) > 1:
                self.flying.pop(handle)
                return [(handle, self.late)]
        return []


@pytest.fixture
def quick_copies(monkeypatch):
    monkeypatch.setattr(lateness, "COPIED_S", 0.02)


@pytest.mark.parametrize(
    ("late", "copy"),
    [
        (None, receipt(Shard(9, ONE))),
        (receipt(Shard(9, ONE)), None),
        (Lost("node died"), receipt(Shard(9, ONE))),
        (own_error(ConflictError("other rows")), receipt(Shard(9, ONE))),
    ],
    ids=["the copy is first", "the copy never ends", "the first is lost", "the first meets other rows"],
)
def test_a_late_shard_at_the_end_is_begun_once_more_and_counts_once(quick_copies, late, copy):
    pool, told = OneSlowNode(late, copy), []
    outcome = drive(shards(10), pool, lambda task, result: told.append((task.seed, type(result))), poll_s=0.01)
    assert Counter(task.seed for task in pool.started) == {**dict.fromkeys(range(9), 1), 9: 2}
    assert len(outcome.receipts) == 10
    assert not outcome.set_aside
    assert [kind for seed, kind in told if seed == 9][-1] is Receipt
    assert not pool.flying, "the other copy is given up"


def test_a_copy_that_is_lost_leaves_the_shard_to_the_first(quick_copies):
    pool = OneSlowNode(receipt(Shard(9, ONE)), Lost("node died"))
    outcome = drive(shards(10), pool, poll_s=0.01)
    assert len(outcome.receipts) == 10
    assert outcome.lost <= 1
    assert pool.started.count(Shard(9, ONE)) == 2, "what is lost of two copies is not owed again"


@pytest.mark.parametrize("copy", [Lost("out of memory"), own_error(), own_error(UnableError("no module", "bad"))])
def test_a_copy_that_comes_to_nothing_is_not_begun_again_and_again(quick_copies, copy):
    class Patient(OneSlowNode):
        """The first one ends long after the copy."""

        avoided = ()

        def wait(self, timeout_s):
            self.late = receipt(Shard(9, ONE)) if time.monotonic() > began + 0.5 else None
            return super().wait(timeout_s)

        def avoid(self, node):
            self.avoided = (*self.avoided, node)

    began, pool = time.monotonic(), Patient(None, copy)
    outcome = drive(shards(10), pool, poll_s=0.01)
    assert len(outcome.receipts) == 10
    assert pool.started.count(Shard(9, ONE)) == 2
    assert pool.avoided == (("bad",) if isinstance(getattr(copy, "error", None), UnableError) else ())


def test_both_copies_lost_are_one_shard_that_is_owed_again(quick_copies):
    class BothLost(OneSlowNode):
        def wait(self, timeout_s):
            time.sleep(0.01)
            for handle, task in list(self.flying.items()):
                if task.seed != 9 or self.started.count(task) > 2:
                    return [(handle, receipt(self.flying.pop(handle)))]
            if self.started.count(Shard(9, ONE)) == 2:
                gone, self.flying = list(self.flying), {}
                return [(handle, Lost("the cluster shrank")) for handle in gone]
            return []

    pool = BothLost(None)
    outcome = drive(shards(10), pool, poll_s=0.01)
    assert len(outcome.receipts) == 10
    assert outcome.lost == 2
    assert pool.started.count(Shard(9, ONE)) == 3


def test_nothing_is_copied_while_there_is_other_work_or_no_idle_slot(quick_copies):
    tasks = [Shard(9, ONE), *shards(9), *[Shard(seed, ONE) for seed in range(10, 60)]]
    copied_at = []

    class Watching(OneSlowNode):
        def submit(self, task):
            if task.seed == 9 and task in self.started:
                copied_at.append(len(self.started))
            return super().submit(task)

    watching = Watching(receipt(Shard(9, ONE)))
    assert len(drive(tasks, watching, poll_s=0.01).receipts) == 60
    assert copied_at == [60], "after all else was begun"
    busy = OneSlowNode(None, None)
    busy._slots = 1
    stop = iter([None] * 60)
    outcome = drive(shards(10), busy, should_stop=lambda: next(stop, "enough"), poll_s=0.01)
    assert busy.started.count(Shard(9, ONE)) == 1
    assert outcome.stopped == "enough"


@pytest.mark.parametrize("hung", [{9}, {8, 9}], ids=["one runs there", "one more waits for it"])
def test_a_copy_waits_until_the_node_that_has_frozen_is_avoided(quick_copies, hung):
    class OneFrozenNode(OneSlowNode):
        """What was handed to the frozen node ends never, and so does a copy begun before it is doubted."""

        doubted, hangs = False, ()

        def slots(self):
            return 1 if self.doubted else 2

        def doubt(self, seconds):
            self.doubted, before = True, self.doubted
            return not before

        def submit(self, task):
            handle = super().submit(task)
            if task.seed in hung and not self.doubted:
                self.hangs = (*self.hangs, handle)
            return handle

        def wait(self, timeout_s):
            time.sleep(0.01)
            ended = [handle for handle in self.flying if handle not in self.hangs]
            return [(handle, receipt(self.flying.pop(handle))) for handle in ended[:1]]

    pool, stop = OneFrozenNode(None), iter([None] * 200)
    outcome = drive(shards(10), pool, should_stop=lambda: next(stop, "hangs"), poll_s=0.01)
    assert outcome.stopped is None
    assert len(outcome.receipts) == 10
    # On a busy machine another shard may be late too.
    assert all(pool.started.count(Shard(seed, ONE)) == 2 for seed in hung)
