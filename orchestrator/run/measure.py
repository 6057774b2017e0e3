"""What a sweep will cost, from a few timed steps and estimates on this machine. Writes nothing.

The engine is proven first, as the sweep's first worker would: what it may use decides what a shard takes. Then a few
steps of every size of stack are timed, and every estimator on as many examples as take a few seconds.
"""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any

import torch

from fimo.orchestrator.resolve.resolved import Resolved
from fimo.orchestrator.run.blocks import Named
from fimo.orchestrator.run.failures import Failures
from fimo.orchestrator.run.owed import missing_estimates, missing_witnesses, to_hand_over
from fimo.orchestrator.run.plan import Plan, seeds_together, size_of_shards
from fimo.orchestrator.run.proving import rehearsed
from fimo.orchestrator.run.timing import Estimators, Shards, seconds_of_witnesses
from fimo.orchestrator.run.work import EstimateTask, Shard, Together, WitnessTask, Work, tasks_in
from fimo.orchestrator.store import MemoryStore
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.device import deterministic, pick_device

RAY_S = 4.0
"""Seconds that an embedded Ray takes to start and to end."""
TABLES_S = 2.0
"""Seconds that reducing and scoring a small sweep take."""

Say = Callable[[str], None]


@dataclass
class Measured:
    """What was timed and reckoned, in seconds of one device.

    Attributes:
        workers: tasks that run at once on this machine.
        start: what every worker does before its first task, once it has loaded; ``proof``: what the first adds to it.
        step: of one cell in a full stack; ``cell``: all of its steps and evaluations.
        tasks: what is missing, in the order in which it runs, with the seconds of each.
        left_out: estimators of the default set that the run will leave out for their cost, with the reason.
    """

    device: str
    workers: int
    replicas: int
    engine: str
    start: float
    proof: float
    step: float
    cell: float
    tasks: list[tuple[Work, float]] = field(default_factory=list)
    left_out: dict[Named, str] = field(default_factory=dict)

    def seconds(self, *kinds: type[Work]) -> float:
        """Of all tasks of some kinds."""
        return sum(seconds for task, seconds in self.tasks if isinstance(task, kinds))

    def by_estimator(self) -> dict[Named, float]:
        """Seconds of each estimator, all of its tasks together."""
        total: dict[Named, float] = {}
        for task, seconds in self.tasks:
            if isinstance(task, EstimateTask):
                named = task.estimator, task.params
                total[named] = total.get(named, 0.0) + seconds
        return total

    def wall(self, load: float) -> float:
        """Seconds that ``fimo run`` takes here, from its start to its tables.

        Args:
            load: of a new process until it has loaded the workload; a run does it once, and then in every worker.
        """
        if not self.tasks:
            return load + TABLES_S
        free = [load + self.start + self.proof] * self.workers
        heapq.heapify(free)
        for _, seconds in _in_order(self.tasks):
            heapq.heappush(free, heapq.heappop(free) + seconds)
        return load + RAY_S + max(free) + TABLES_S


def _in_order(tasks: list[tuple[Work, float]]) -> list[tuple[Work, float]]:
    """As ``run/owed.py`` hands them out: shards and estimates in turns, witnesses last."""
    estimates, shards, witnesses = (
        [t for t in tasks if isinstance(t[0], kind)] for kind in (EstimateTask, Shard | Together, WitnessTask)
    )
    mixed = chain.from_iterable(zip_longest(estimates, shards))
    return [*(t for t in mixed if t is not None), *witnesses]


def measure(resolved: Resolved, plan: Plan, sweep: Sweep | None = None, say: Say = lambda line: None) -> Measured:
    """Time what is missing of a sweep on this machine.

    Args:
        sweep: what it holds is not computed again; None = all is missing.
        say: told what is being timed.

    Raises:
        FimoError: the workload cannot be trained further, or the engine is not proven on it.
    """
    manifest, resources = resolved.manifest, resolved.spec.resources
    device = pick_device(resources.gpus)
    torch.set_num_threads(max(1, int(resources.cpus)))
    held, nothing = sweep or Sweep(MemoryStore(), manifest.spec.name), Failures((), {})
    with deterministic(device):
        say("timing: what every worker starts with, and the proof of the engine")
        began = time.perf_counter()
        start = resolved.start(device)
        started = time.perf_counter() - began
        engine, proof_s = rehearsed(held, resolved, start)
        say("timing: a shard")
        shards = Shards(engine, resolved.spec.seeds.first)
        step, cell = shards.a_cell([r.indices for r in manifest.removals])
        path, workers = str(engine.record["path"]), _workers(resources.cpus, resources.gpus)
        # No task trains more than its own cells together.
        cells = min(size_of_shards(manifest), len(manifest.removals)) + 1
        seeds = seeds_together(manifest, len(manifest.removals)) if engine.start.joins else 1
        together = min(engine.replicas, seeds * cells)
        measured = Measured(device.type, workers, together, path, started, proof_s, step, cell)
        for work in to_hand_over(manifest, held, plan.shards):
            some = work.shards if isinstance(work, Together) else [t for t in tasks_in(work) if isinstance(t, Shard)]
            took = shards.together([([r.indices for r in shard.removals], shard.seed) for shard in some])
            measured.tasks.append((work, took))
            if len(some) > 1:
                own = took / sum(len(shard.removals) + 1 for shard in some)
                measured.step, measured.cell = step * own / cell, own
        _time_estimators(measured, Estimators(resolved, engine, say), missing_estimates(manifest, held, nothing))
        witnesses = missing_witnesses(manifest, held, nothing)
        if witnesses:
            say("timing: witnesses of the noise floor")
            each = seconds_of_witnesses(resolved, engine, witnesses[0])
            measured.tasks += [(task, each) for task in witnesses]
    return measured


def _time_estimators(measured: Measured, timed: Estimators, owed: list[EstimateTask]) -> None:
    for task in owed:
        reason = timed.left_out(task)
        if reason is not None:
            measured.left_out[task.estimator, task.params] = reason
        else:
            measured.tasks.append((task, timed.seconds(task)))


def _workers(cpus: float, gpus: float) -> int:
    """Tasks that an embedded Ray runs at once here."""
    by_cpu = (os.cpu_count() or 1) / cpus if cpus else float("inf")
    by_gpu = torch.cuda.device_count() / gpus if gpus and torch.cuda.is_available() else float("inf")
    return max(1, int(min(by_cpu, by_gpu)))


def measured_json(measured: Measured, load: float) -> dict[str, Any]:
    """For ``fimo plan --json``; all in seconds of one device, but ``wall_seconds`` and ``device_hours``.

    Args:
        load: seconds until a new process has loaded the workload.
    """
    total = sum(seconds for _, seconds in measured.tasks)
    return {
        "device": measured.device,
        "workers": measured.workers,
        "replicas": measured.replicas,
        "engine": measured.engine,
        "seconds_per_step": measured.step,
        "seconds_per_cell": measured.cell,
        "seconds": {
            "load": load,
            "start": measured.start,
            "proof": measured.proof,
            "shards": measured.seconds(Shard, Together),
            "witnesses": measured.seconds(WitnessTask),
            "estimators": [
                {"name": name, "params": params, "seconds": seconds}
                for (name, params), seconds in measured.by_estimator().items()
            ],
        },
        "device_seconds": total,
        "device_hours": total / 3600,
        "wall_seconds": measured.wall(load),
        "too_dear": [{"name": n, "params": p, "why": why} for (n, p), why in measured.left_out.items()],
    }
