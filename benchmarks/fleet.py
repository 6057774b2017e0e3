"""A thousand GPUs that are not there: the real schedule on a clock of events, over shard times that were measured.

    python benchmarks/fleet.py [--gpus 1000] [--removals 1000 --seeds 100] [--cell-s 2] [--costs FILE]

The plan's shards go through ``run.schedule.drive`` itself (window, retries, deadlines, doubt of nodes that return
nothing) on a pool whose GPUs take seconds of a simulated clock:

* a shard of k removals takes k + 2 cells (its baseline, and the second one), each ``--cell-s``, times a factor that is
  drawn from measured shards: of a sweep's ``costs.parquet``, or of shards of Concrete trained here first;
* a GPU's first shard takes ``--start-s`` more: a process, the model, the data, traced steps;
* one GPU in a hundred is three times as slow; one in a thousand freezes at some time and never returns a thing;
* a GPU is reclaimed every ``--hours-between`` hours on average, its shard is lost, and another comes 5 minutes later.

*used* is the share of GPU time, from the first to the last shard, that computed the cells that were asked for; what is
missing of it are second baselines and baselines (*baselines*), shards that were lost with their GPU or given up
(*lost*), and GPUs that had nothing to do or were away (*idle*). *last* is how long the run goes on after 99% of its
shards are there. *driver* is real CPU of this process, a shard.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import statistics
import time
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pyarrow.parquet as pq

from fimo.orchestrator.run import lateness, schedule
from fimo.orchestrator.run.places import Pool
from fimo.orchestrator.run.results import Lost, Receipt, Result
from fimo.orchestrator.run.work import Shard, Work
from fimo.orchestrator.spec.removals import NamedRemoval

NOTICED_S, BACK_S = 16.0, 300.0
"""Seconds until a node that has gone is noticed, and until another one is there."""
SLOW, SLOWER, FROZEN = 0.01, 3.0, 0.001
"""The share of slow GPUs and how many times as long they take; the share of those that freeze."""


@dataclass(frozen=True)
class World:
    """What a fleet is like.

    Attributes:
        spread: factors of a shard's time, as measured.
        hours_between: hours between two reclaims of a GPU.
    """

    gpus: int
    cell_s: float
    start_s: float
    spread: Sequence[float]
    hours_between: float


@dataclass
class _Gpu:
    slower: float
    frozen_at: float
    fresh: bool = True
    away: bool = False
    handle: int | None = None
    began: float = 0.0
    turn: int = 0
    avoided: bool = False
    returned: float = 0.0


@dataclass
class Seconds:
    """GPU seconds by what they were spent on."""

    cells: float = 0.0
    baselines: float = 0.0
    starts: float = 0.0
    lost: float = 0.0
    ends: list[float] = field(default_factory=list)


class Clock:
    """Stands in for ``time`` in the schedule."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Fleet(Pool):
    """GPUs that take tasks in the order in which they were handed over."""

    def __init__(self, world: World, clock: Clock, seed: int) -> None:
        self.world, self.clock, self.random = world, clock, random.Random(seed)
        self.gpus = [self._gpu() for _ in range(world.gpus)]
        self.queue: deque[int] = deque()
        self.tasks: dict[int, Shard] = {}
        self.where: dict[int, int] = {}
        self.idle = deque(range(world.gpus))
        self.spent = Seconds()
        self._count = 0
        # (when, a number that keeps equal times apart, what, gpu, its turn)
        self._events: list[tuple[float, int, str, int, int]] = []
        self._numbers = itertools.count()
        for place in range(world.gpus):
            self._reclaim_some_time(place)

    def _gpu(self) -> _Gpu:
        slower = SLOWER if self.random.random() < SLOW else 1.0
        frozen = self.random.uniform(0, 3600) if self.random.random() < FROZEN else math.inf
        return _Gpu(slower, self.clock.now + frozen)

    def _at(self, seconds: float, what: str, place: int) -> None:
        event = (self.clock.now + seconds, next(self._numbers), what, place, self.gpus[place].turn)
        heapq.heappush(self._events, event)

    def _reclaim_some_time(self, place: int) -> None:
        self._at(self.random.expovariate(1 / (3600 * self.world.hours_between)), "reclaim", place)

    def submit(self, task: Work) -> Hashable:
        assert isinstance(task, Shard)
        self._count += 1
        self.tasks[self._count] = task
        self.queue.append(self._count)
        self._begin()
        return self._count

    def _begin(self) -> None:
        while self.queue and self.idle:
            place = self.idle.popleft()
            gpu = self.gpus[place]
            if gpu.away or gpu.avoided or gpu.handle is not None:
                continue
            handle = self.queue.popleft()
            if handle not in self.tasks:
                self.idle.appendleft(place)
                continue
            gpu.handle, gpu.began, gpu.turn = handle, self.clock.now, gpu.turn + 1
            self.where[handle] = place
            seconds = self._work_s(handle, gpu) + (self.world.start_s if gpu.fresh else 0.0)
            if self.clock.now + seconds < gpu.frozen_at:
                self._at(seconds, "done", place)

    def _work_s(self, handle: int, gpu: _Gpu) -> float:
        cells = len(self.tasks[handle].removals) + 2
        return cells * self.world.cell_s * gpu.slower * self.random.choice(self.world.spread)

    def wait(self, timeout_s: float) -> list[tuple[Hashable, Result]]:
        until, found = self.clock.now + timeout_s, list[tuple[Hashable, Result]]()
        while self._events and self._events[0][0] <= until:
            when, _, what, place, turn = heapq.heappop(self._events)
            self.clock.now = when
            gpu = self.gpus[place]
            if what == "done" and turn == gpu.turn and gpu.handle is not None:
                found.append(self._done(place, gpu))
            elif what == "reclaim":
                self._reclaim(place, gpu)
            elif what == "back":
                self.gpus[place] = self._gpu()
                self.gpus[place].turn = turn + 1
                self.idle.append(place)
                self._reclaim_some_time(place)
            elif what == "noticed" and turn in self.tasks:
                found.append((turn, Lost("the node was reclaimed")))
                del self.tasks[turn]
            self._begin()
        self.clock.now = until
        return found

    def _done(self, place: int, gpu: _Gpu) -> tuple[Hashable, Result]:
        handle, spent = gpu.handle, self.clock.now - gpu.began
        assert handle is not None
        starts = self.world.start_s if gpu.fresh else 0.0
        gpu.handle, gpu.fresh, gpu.returned = None, False, self.clock.now
        self.where.pop(handle)
        if not gpu.avoided:
            self.idle.append(place)
        task = self.tasks.pop(handle)
        count = len(task.removals)
        self.spent.starts += starts
        self.spent.cells += (spent - starts) * count / (count + 2)
        self.spent.baselines += (spent - starts) * 2 / (count + 2)
        self.spent.ends.append(self.clock.now)
        return handle, Receipt("", True, count, 0, spent, "simulated")

    def _reclaim(self, place: int, gpu: _Gpu) -> None:
        if gpu.away:
            return
        gpu.away, gpu.turn = True, gpu.turn + 1
        if gpu.handle is not None:
            self.spent.lost += self.clock.now - gpu.began
            self.where.pop(gpu.handle)
            event = (self.clock.now + NOTICED_S, next(self._numbers), "noticed", place, gpu.handle)
            heapq.heappush(self._events, event)
            gpu.handle = None
        self._at(BACK_S, "back", place)

    def cancel(self, handle: Hashable) -> None:
        assert isinstance(handle, int)
        self.tasks.pop(handle, None)
        place = self.where.pop(handle, None)
        if place is not None:
            gpu = self.gpus[place]
            self.spent.lost += self.clock.now - gpu.began
            gpu.handle, gpu.turn = None, gpu.turn + 1
            # A frozen GPU is no place for the next one either, but nobody knows that it is one.
            self.idle.append(place)

    def slots(self) -> int:
        return sum(not (gpu.away or gpu.avoided) for gpu in self.gpus)

    def doubt(self, seconds: float) -> bool:
        """As the pool on Ray: nodes that have returned nothing for so long while others have."""
        doubted = [
            gpu
            for gpu in self.gpus
            if gpu.handle is not None and not gpu.avoided and self.clock.now - max(gpu.returned, gpu.began) >= seconds
        ]
        for gpu in doubted:
            gpu.avoided = True
        return bool(doubted)


def measured(shards: int = 24) -> list[float]:
    """Seconds of shards of Concrete on this machine's CPU, of their median."""
    import torch
    from engine import tabular

    from fimo.workers.device import deterministic
    from fimo.workers.shard import run_shard
    from fimo.workers.stacking.together import start_of

    case = tabular("reweight")
    with deterministic(torch.device("cpu")):
        start = start_of(case.workload, case.settings)
        run_shard(start, [(0,)], 0, 12)
        took = []
        for seed in range(shards):
            began = time.perf_counter()
            run_shard(start, [(i,) for i in range(11)], seed, 12)
            took.append(time.perf_counter() - began)
    return relative(took)


def relative(seconds: Sequence[float]) -> list[float]:
    usual = statistics.median(seconds)
    return [one / usual for one in seconds]


def costs(path: Path) -> list[float]:
    """The same of a sweep's ``costs.parquet``."""
    rows = pq.read_table(path).to_pylist()
    return relative([row["device_seconds"] for row in rows if row["what"] == "shard"])


def simulated(world: World, shards: Sequence[Shard], seed: int, policy: Policy) -> dict[str, float]:
    clock = Clock()
    fleet, cpu = Fleet(world, clock, seed), time.process_time()
    order = sorted(shards, key=lambda shard: -len(shard.removals)) if policy.largest_first else shards
    with (
        mock.patch.multiple(schedule, time=clock, WINDOW=policy.window),
        mock.patch.object(lateness, "COPIED", lateness.COPIED if policy.copies else math.inf),
    ):
        outcome = schedule.drive(order, fleet, poll_s=1.0)
    cpu = time.process_time() - cpu
    assert outcome.stopped is None, outcome.stopped
    assert len(outcome.receipts) + len(outcome.set_aside) == len(shards), "a shard was lost for good"
    spent, ends = fleet.spent, sorted(fleet.spent.ends)
    whole = world.gpus * ends[-1]
    return {
        "hours": ends[-1] / 3600,
        "used": spent.cells / whole,
        "baselines": spent.baselines / whole,
        "starts": spent.starts / whole,
        "lost": spent.lost / whole,
        "idle": 1 - (spent.cells + spent.baselines + spent.starts + spent.lost) / whole,
        "last": (ends[-1] - ends[math.ceil(0.99 * len(ends)) - 1]) / ends[-1],
        "aside": len(outcome.set_aside),
        "driver_ms": 1e3 * cpu / len(shards),
    }


@dataclass(frozen=True)
class Policy:
    """What the schedule does: tasks handed over of those that run, late shards copied at the end, the order."""

    window: int = schedule.WINDOW
    copies: bool = True
    largest_first: bool = False

    @property
    def words(self) -> str:
        order = "largest first" if self.largest_first else "in order"
        return f"window {self.window}, {'late shards copied' if self.copies else 'no copies'}, {order}"


POLICIES = [Policy(), Policy(copies=False), Policy(window=1), Policy(window=4), Policy(largest_first=True)]


def plan(removals: int, seeds: int, size: int) -> list[Shard]:
    every = [NamedRemoval(i, str(i), (i,)) for i in range(removals)]
    return [
        Shard(seed, tuple(every[first : first + size])) for seed in range(seeds) for first in range(0, removals, size)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument("--removals", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--cell-s", type=float, default=2.0)
    parser.add_argument("--start-s", type=float, default=30.0)
    parser.add_argument("--hours-between", type=float, default=20.0)
    parser.add_argument("--costs", type=Path, help="a sweep's costs.parquet: the spread of its shards' times")
    parser.add_argument("--sizes", type=int, nargs="*", default=[5, 10, 20, 50, 100])
    parser.add_argument("--policies-at", type=int, default=30, help="removals a shard for the other schedules")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    spread = costs(asked.costs) if asked.costs else measured()
    world = World(asked.gpus, asked.cell_s, asked.start_s, spread, asked.hours_between)
    print(
        f"{asked.removals * asked.seeds} cells of {asked.cell_s} s on {asked.gpus} GPUs; shards' times from "
        f"{min(spread):.2f} to {max(spread):.2f} of their median; medians of {asked.rounds} rounds\n"
    )
    names = ["hours", "used", "baselines", "starts", "lost", "idle", "last", "aside", "driver_ms"]
    print("| removals a shard | shards | seconds a shard | schedule | " + " | ".join(names) + " |")
    print("|---" * (4 + len(names)) + "|")
    rows = [(size, POLICIES[0]) for size in asked.sizes] + [(asked.policies_at, policy) for policy in POLICIES[1:]]
    for size, policy in rows:
        shards = plan(asked.removals, asked.seeds, size)
        rounds = [simulated(world, shards, seed, policy) for seed in range(asked.rounds)]
        row = {name: statistics.median(one[name] for one in rounds) for name in names}
        cells = [f"{row[n]:.2f}" if n in ("hours", "driver_ms") else f"{row[n]:.1%}" for n in names if n != "aside"]
        cells.insert(names.index("aside"), f"{row['aside']:.0f}")
        about = f"| {size} | {len(shards)} | {(size + 2) * asked.cell_s:.0f} | {policy.words} | "
        print(about + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
