"""Seconds of a sweep's tasks, from parts of them that are timed here: shards, blocks of estimates, witnesses.

A shard is reckoned from a few steps of each size of stack that it trains. An estimator is run on as many examples as
take a few seconds, and what that took goes up with the work that it counts itself (``Estimator.work``).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import ceil

import torch

from fimo import estimators
from fimo.estimators.rates import Rates
from fimo.orchestrator.resolve.resolved import Resolved
from fimo.orchestrator.run.blocks import shares
from fimo.orchestrator.run.budget import too_dear, too_large
from fimo.orchestrator.run.proving import Proven
from fimo.orchestrator.run.work import EstimateTask, WitnessTask
from fimo.workers.amounts import BASELINE, Removal, steps_recorded
from fimo.workers.device import clock
from fimo.workers.errors import FimoError
from fimo.workers.joined import cut
from fimo.workers.shard import out_of_memory
from fimo.workers.stacking.forking import stacks_of
from fimo.workers.stacking.pace import Pace, pace
from fimo.workers.start import Start
from fimo.workers.witness import witness_start

STACK_S = 6.0
"""Seconds that timing one size of stack may take, beyond its first steps."""
WHOLE_S = 4.0
"""Counted seconds up to which an estimate is timed as a whole."""
LONGEST = 4
"""Times that by which a part may take longer, if smaller ones diverge."""
APART = 1.5
"""Times the work of the smaller part that the larger one has at least, for their difference to be more than noise."""
LEAST_TRAIN, LEAST_SIDE = 16, 8
"""Training examples, and removals or evaluation examples, of the smallest part of an estimate."""


class Shards:
    """Times stacks of each size once."""

    def __init__(self, engine: Proven, seed: int, budget_s: float = STACK_S) -> None:
        self._engine, self._seed, self._budget_s = engine, seed, budget_s
        self._paces: dict[tuple[int, int, int], Pace] = {}

    def _pace(self, start: Start, lanes: Sequence[Removal], seeds: Sequence[int] | None = None) -> Pace:
        # In reweight mode a cell that removes something takes a pass more than a baseline does.
        kind = len(lanes), max(map(len, lanes)), len(set(seeds or [self._seed]))
        if kind not in self._paces:
            self._paces[kind] = self._timed(start, lanes, seeds)
        return self._paces[kind]

    @property
    def traced(self) -> float:
        """What tracing took so far: a new start traces its steps again."""
        return sum(own.traced for own in self._paces.values())

    def _timed(self, start: Start, lanes: Sequence[Removal], seeds: Sequence[int] | None) -> Pace:
        """Of one stack; if it cannot be, of the smaller ones that ``workers/shard.py`` trains in its place."""
        try:
            return pace(start, lanes, seeds or self._seed, self._budget_s)
        except FimoError:
            raise
        except Exception as error:
            if len(lanes) == 1:
                raise
            size = len(lanes) // 2 if out_of_memory(error) else 1
        smaller = self._pace(start, lanes[:size], None if seeds is None else seeds[:size])
        times = ceil(len(lanes) / size)
        return Pace(smaller.step * times, smaller.evaluation * times, smaller.first * times)

    def seconds(self, removals: Sequence[Removal], second: bool = True) -> float:
        """Of training the removals with their baseline, and with a second one unless ``second`` is false."""
        start, replicas = self._engine.start, self._engine.replicas
        recorded = steps_recorded(len(start.train), start.settings)
        cells = [BASELINE, *removals]
        size = replicas if start.engine.stack else 1
        total = 0.0
        for stack in stacks_of(start, cells, range(len(cells)), self._seed, size):
            shared = stack.shared if start.engine.fork else 0
            due = sum(step > shared for step in recorded)
            total += self._pace(start, stack.lanes).seconds(recorded[-1] - shared, due)
        if second:
            alone = [BASELINE] if size > 1 or not start.engine.stack else [BASELINE, BASELINE]
            total += self._pace(start, alone).seconds(recorded[-1], len(recorded))
        return total

    def together(self, shards: Sequence[tuple[Sequence[Removal], int]]) -> float:
        """Seconds of shards that are one task: see ``fimo.workers.joined``."""
        start, total = self._engine.start, 0.0
        recorded = steps_recorded(len(start.train), start.settings)
        for some in cut(start, shards, self._engine.replicas):
            if len(some) == 1:
                total += self.seconds(some[0][0])
                continue
            lanes = [(cell, seed) for removals, seed in some for cell in (BASELINE, *removals)]
            for stack in (lanes, [lane for lane in lanes if lane[0] == BASELINE]):
                cells, seeds = zip(*stack, strict=True)
                total += self._pace(start, cells, seeds).seconds(recorded[-1], len(recorded))
        return total

    def a_cell(self, removals: Sequence[Removal]) -> tuple[float, float]:
        """Seconds of a step, and of the whole, of one cell in a full stack."""
        start = self._engine.start
        recorded = steps_recorded(len(start.train), start.settings)
        lanes = [BASELINE, *removals][: self._engine.replicas if start.engine.stack else 1]
        own = self._pace(start, lanes)
        return own.step / len(lanes), own.seconds(recorded[-1], len(recorded)) / len(lanes)


def seconds_of_witnesses(resolved: Resolved, engine: Proven, task: WitnessTask) -> float:
    """Of a seed's witnesses, as many as are planned; and its moved cells, which train on the sweep's own start."""

    def of(start: Start, removals: int) -> float:
        lanes = [r.indices for r in (*task.removals, *task.moved)][:removals]
        own = Proven(start, min(engine.replicas, removals + 1), engine.record)
        shards = Shards(own, task.seed, STACK_S / 2)
        return shards.seconds(lanes, second=False) + shards.traced

    wide = witness_start(resolved.workload, resolved.state, engine.start)
    return of(wide.start, len(task.removals)) + (of(engine.start, len(task.moved)) if task.moved else 0.0)


class Estimators:
    """Times every estimator once for each shape of its tasks."""

    def __init__(self, resolved: Resolved, engine: Proven, say: Callable[[str], None]) -> None:
        self._resolved, self._engine, self._say = resolved, engine, say
        self._seconds: dict[tuple[object, ...], float] = {}
        self._left_out: dict[tuple[str, str], str | None] = {}

    def _problem(self, task: EstimateTask) -> tuple[estimators.Estimator, estimators.Problem]:
        [named] = estimators.parse({"name": task.estimator, **json.loads(task.params)})
        start, spec = self._engine.start, self._resolved.spec
        return named, estimators.Problem(
            model=start.model,
            train=start.train,
            evals=start.examples.span(task.first, task.count),
            removals=[r.indices for r in task.removals],
            further_training=start.settings,
            seeds=list(spec.seeds) if task.seed is None else [task.seed],
            start=start if named.trains else None,
            replicas=self._engine.replicas if named.trains else None,
        )

    def left_out(self, task: EstimateTask) -> str | None:
        """Why the run will leave the task's estimator out of the default set for its cost; None if it will not."""
        spec, manifest = self._resolved.spec, self._resolved.manifest
        name = task.estimator, task.params
        if spec.estimators is not None:
            return None
        if name not in self._left_out:
            named, problem = self._problem(task)
            tasks = sum(1 for _ in shares(manifest, *name))
            self._left_out[name] = too_dear(named, problem, tasks, spec, manifest.steps[-1])
        return self._left_out[name]

    def seconds(self, task: EstimateTask) -> float:
        """Of one task; from its own count alone if it does not fit in the memory that is free here."""
        shape = task.estimator, task.params, len(task.removals), task.count
        if shape not in self._seconds:
            named, problem = self._problem(task)
            self._say(f"timing: estimator {task.estimator}")
            work = named.work(problem)
            large = too_large(work, problem.model.device) is not None
            self._seconds[shape] = Rates(problem).seconds(work) if large else self._timed(named, problem)
        return self._seconds[shape]

    def _timed(self, named: estimators.Estimator, problem: estimators.Problem) -> float:
        rates = Rates(problem)
        counted = rates.seconds(named.work(problem))
        sizes = [(problem, counted)]
        for smaller in parts_of(problem, follows_runs(named)):
            whole_run = len(smaller.train) == len(problem.train) and smaller.at == problem.at
            # Of fewer training examples or steps a solver is another one: only if there is no other way.
            if sizes[-1][1] <= (WHOLE_S / 2 if whole_run else 2 * WHOLE_S):
                break
            sizes.append((smaller, rates.seconds(named.work(smaller))))
        before, displaced = 0.0, None
        step = named.params().get("displacement_step")
        if isinstance(step, int):
            # The baselines are trained again first, one after another.
            alone = pace(self._engine.start, [BASELINE], 0, STACK_S)
            before = self._resolved.spec.seeds.count * alone.seconds(step, 0)
            still = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in problem.model.params.items()}
            displaced = {step: still}
        # The whole, if it is counted to be short; else two parts, since what a part takes whatever its size is no
        # share of the whole.
        parts = sizes[:1] if counted <= WHOLE_S else sizes[::-1]
        work, seconds = list[float](), list[float]()
        for part, of_part in parts:
            if len(work) == 2 or of_part > LONGEST * WHOLE_S:
                break
            if work and of_part < APART * work[0]:
                continue
            # A part of the examples may diverge where more do not.
            with contextlib.suppress(FimoError):
                taken = _seconds(named, replace(part, displacement=displaced))
                work, seconds = [of_part, *work], [taken, *seconds]
        return before + (extrapolated(counted, work, seconds) if work else counted)


def _seconds(named: estimators.Estimator, problem: estimators.Problem) -> float:
    device = problem.model.device
    read = clock(device)
    if device.type == "cuda":
        # What was asked of the device before is none of it.
        torch.cuda.synchronize(device)
    began = read()
    named.estimate(problem)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return read() - began


def extrapolated(whole: float, work: Sequence[float], seconds: Sequence[float]) -> float:
    """What the whole takes, from what one or two parts of it took: seconds = a + b · work, with a and b not negative.

    Args:
        whole: its work; ``work``: of each part, the larger first.
    """
    if whole == work[0]:
        return seconds[0]
    if len(work) == 1 or work[0] <= work[1]:
        return seconds[0] * whole / max(work[0], 1e-9)
    slope = (seconds[0] - seconds[1]) / (work[0] - work[1])
    # Never steeper than if nothing were fixed, nor flatter than nothing.
    slope = min(max(slope, 0.0), seconds[0] / work[0])
    return seconds[0] + slope * (whole - work[0])


def follows_runs(named: estimators.Estimator) -> bool:
    """Whether an estimator follows runs of the sweep's own length, so that a part of it is a part of the steps."""
    return named.follows_training() and bool(named.runs((0,)))


def parts_of(problem: estimators.Problem, trains: bool) -> Iterator[estimators.Problem]:
    """Ever smaller parts of a problem: of its removals and evaluation examples first, then of what it is trained on.

    So that a solver takes as many iterations in a part as in the whole, as long as that can be.

    Args:
        trains: the estimator trains on all of 𝒟: it is the steps that are fewer.
    """
    sides = 1.0
    while sides * max(len(problem.evals), len(problem.removals)) > LEAST_SIDE:
        sides /= 2
        yield part_of(problem, sides, 1.0, trains)
    share = 1.0
    while share * len(problem.train) > LEAST_TRAIN or (trains and share > 1e-3):
        share /= 2
        yield part_of(problem, sides, share, trains)


def part_of(problem: estimators.Problem, sides: float, share: float, trains: bool) -> estimators.Problem:
    """A problem of a share of the removals and evaluation examples, and of the training examples, or of the steps.

    Args:
        trains: as for ``parts_of``.
    """
    n, evals = len(problem.train), len(problem.evals)
    fewer = problem.removals[: max(1, round(sides * len(problem.removals)))]
    cut = replace(problem, evals=problem.evals.first(max(1, round(sides * evals))), removals=fewer)
    if share == 1.0:
        return cut
    if not trains:
        kept = min(n, max(LEAST_TRAIN, round(share * n)))
        inside = [tuple(dict.fromkeys(index % kept for index in removal)) for removal in fewer]
        return replace(cut, train=problem.train.first(kept), removals=inside)
    assert problem.further_training is not None
    recorded = steps_recorded(n, problem.further_training)
    near = max([step for step in recorded if step <= share * recorded[-1]], default=recorded[0])
    return replace(cut, at=tuple(step for step in recorded if step <= near))
