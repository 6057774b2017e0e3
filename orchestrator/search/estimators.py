"""The search over estimators' hyper-parameters: every point scored against a sweep's attribution, nothing trained.

A point is a trial in a process that keeps the workload. Its scores are an object of the sweep before it reports, so an
interrupted search goes on where it was and ends with the same best points. See ``tables/halves.py`` for the two halves.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fimo.orchestrator.resolve.loading import read_final
from fimo.orchestrator.resolve.resolved import Resolved
from fimo.orchestrator.run.blocks import value_digest
from fimo.orchestrator.run.driver import refuse_other
from fimo.orchestrator.run.estimate_block import estimate_whole
from fimo.orchestrator.run.growing import with_its_seeds
from fimo.orchestrator.run.owed import current_plan
from fimo.orchestrator.run.reading import Gathered, seed_blocks
from fimo.orchestrator.run.results import CannotEstimateError
from fimo.orchestrator.run.witnesses import read_witnesses
from fimo.orchestrator.run.written import listed_parts, stamp
from fimo.orchestrator.search.place import Place
from fimo.orchestrator.search.points import Point, points_of
from fimo.orchestrator.search.records import Records
from fimo.orchestrator.spec.canonical import digest
from fimo.orchestrator.spec.search import Search
from fimo.orchestrator.store import Store
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables.halves import SPLIT_SEED, Gold, HalfScore, best_at, best_over, gold_of, half_scores
from fimo.orchestrator.tables.reduce import reduce
from fimo.orchestrator.tables.score import Scorer
from fimo.workers.errors import FimoError, UsageError

WORST = -2.0
"""Objective of a point that has no score: below any agreement."""


@dataclass(frozen=True)
class Listener:
    """Who is told: how many points there are and how many of them are there already; each result; lines of talk."""

    start: Callable[[int, int], None]
    done: Callable[[str], None]
    say: Callable[[str], None]


@dataclass(frozen=True)
class Tried:
    """A point and what came of it.

    Attributes:
        rows: its scores by step; empty if it ``failed``, with the reason.
        seconds: of the device.
    """

    point: Point
    rows: tuple[HalfScore, ...]
    seconds: float
    device: str
    failed: str | None = None


@dataclass(frozen=True)
class Found:
    """What a search over estimators has found.

    Attributes:
        tried: in the order of the spec, those that are done.
        points: how many there are in all; ``computed``: how many were computed now.
        best: step -> place in ``tried`` of the best point; ``overall``: of the best mean over steps.
        searched, held: evaluation examples in the two halves.
        stopped: why the search ended early; ``errors``: of points that could not be computed.
    """

    sweep: str
    metric: str
    steps: tuple[int, ...]
    tried: tuple[Tried, ...]
    points: int
    computed: int
    best: Mapping[int, int]
    overall: int | None
    searched: int
    held: int
    seeds: int
    seconds: float
    stopped: str | None = None
    errors: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 complete, 1 failed, 3 stopped."""
        if self.stopped is not None:
            return 3
        return 1 if self.errors or all(one.failed is not None for one in self.tried) else 0


def search_estimators(
    resolved: Resolved,
    store: Store,
    section: Search,
    place: Place,
    listener: Listener,
    should_stop: Callable[[], str | None] = lambda: None,
    typed: str = "fimo run SPEC --store STORE",
) -> Found:
    """Try every point that the store has no result of, and choose.

    Args:
        place: where trials run; entered only if there is something to compute.
        typed: the line that runs the sweep, for errors.

    Raises:
        UsageError: a point that cannot be, a step that is not recorded, or the sweep has not been run.
        FimoError: in one line.
    """
    began = time.monotonic()
    points, sweep = points_of(section), Sweep(store, resolved.spec.name)
    manifest = _of_the_sweep(resolved, sweep, typed)
    steps = _steps(section, manifest)
    if manifest.evals < 2:
        raise UsageError("a search needs two evaluation examples at least: one half to choose by, one to report on")
    work = prepare(sweep, manifest, section.metric, steps, listener.say, typed)
    work = dataclasses.replace(work, points={work.name_of(point): point for point in points})
    there = {name for name in work.points if work.read(name) is not None}
    listener.start(len(points), len(there))
    owed, errors = [name for name in work.points if name not in there], dict[str, str]()
    if owed and should_stop() is None:
        with place(manifest) as trials:
            errors = trials(owed, work, told=lambda name, rung: listener.done(name), should_stop=should_stop)
    tried = [one for name in work.points if (one := work.read(name)) is not None]
    rows = [one.rows for one in tried]
    best = {step: at for step in steps if (at := best_at(rows, step)) is not None}
    lost = len(points) - len(tried)
    return Found(
        sweep=sweep.uri,
        metric=section.metric,
        steps=steps,
        tried=tuple(tried),
        points=len(points),
        computed=len(tried) - len(there),
        best=best,
        overall=best_over(rows),
        searched=(manifest.evals + 1) // 2,
        held=manifest.evals // 2,
        seeds=manifest.spec.seeds.count,
        seconds=time.monotonic() - began,
        stopped=should_stop() if lost else None,
        errors=tuple(f"{_named(work.points[name])}: {line}" for name, line in errors.items()),
    )


def _named(point: Point) -> str:
    return f"estimator {point.estimator} {point.params}"


def _of_the_sweep(resolved: Resolved, sweep: Sweep, typed: str) -> Manifest:
    """The manifest with as many seeds as the sweep has; refuses one that has not been run."""
    sweep.store.check()
    try:
        sweep.read_manifest()
    except UsageError as error:
        raise UsageError(f"no sweep '{sweep.name}' in {sweep.store.uri}: run it first, `{typed}`") from error
    refuse_other(resolved.manifest, sweep)
    manifest = with_its_seeds(resolved.manifest, sweep)
    if missing := current_plan(manifest, sweep).missing:
        raise UsageError(f"{sweep.uri} lacks {missing} of its {manifest.cells} cells: run it first, `{typed}`")
    return manifest


def _steps(section: Search, manifest: Manifest) -> tuple[int, ...]:
    if section.steps is None:
        return manifest.steps
    for step in section.steps:
        if step not in manifest.steps:
            near = min(manifest.steps, key=lambda other: abs(other - step))
            raise UsageError(f"search.steps: step {step} is not recorded (did you mean {near}?)")
    return tuple(sorted(set(section.steps)))


@dataclass(frozen=True)
class Trying:
    """What a trial does, in its own process: a point's estimates, scored, and recorded."""

    sweep: Sweep
    manifest: Manifest
    final_model: bytes | None
    gold: Gold
    records: Records
    points: Mapping[str, Point] = dataclasses.field(default_factory=dict)

    def __call__(self, name: str, rung: int, gpu: int) -> float:
        """The point's mean score over steps on the searched half."""
        point = self.points[name]
        there = self.read(name)
        if there is None:
            there = self._computed(point, gpu)
            values = {"rows": [dataclasses.asdict(row) for row in there.rows], "failed": there.failed}
            self.records.write(name, {**values, "seconds": there.seconds, "device": there.device})
        scores = [row.searched for row in there.rows if row.searched is not None]
        return float(np.mean(scores)) if scores else WORST

    def _computed(self, point: Point, gpu: int) -> Tried:
        try:
            done = estimate_whole(self.sweep, self.manifest, self.final_model, point.estimator, point.params, gpu)
        except CannotEstimateError as error:
            return Tried(point, (), 0.0, "", str(error))
        return Tried(point, tuple(half_scores(self.gold, done.matrix)), done.seconds, done.device)

    def name_of(self, point: Point) -> str:
        """64 hex digits of the point and of all that its estimates depend on."""
        return digest([point.estimator, point.params, value_digest(self.manifest, point.estimator, point.params)])

    def read(self, name: str) -> Tried | None:
        """What is recorded of a point."""
        values = self.records.read(name)
        try:
            return None if values is None else _tried(self.points[name], values)
        except (KeyError, TypeError, ValueError):
            return None


def _tried(point: Point, values: Mapping[str, Any]) -> Tried:
    rows = tuple(HalfScore(**row) for row in values["rows"])
    return Tried(point, rows, float(values["seconds"]), str(values["device"]), values["failed"])


def prepare(
    sweep: Sweep, manifest: Manifest, metric: str, steps: tuple[int, ...], say: Callable[[str], None], typed: str
) -> Trying:
    """Read a sweep's attribution once, and say what results against it depend on.

    Raises:
        FimoError: an object of the sweep does not verify.
    """
    listed, gathered = listed_parts(sweep, manifest), Gathered({})
    witnesses = read_witnesses(sweep, manifest, listed)
    blocks = seed_blocks(sweep, manifest, listed, gathered, [], say)
    blocks, reduction = reduce(blocks, len(manifest.removals), len(manifest.steps), manifest.evals, witnesses.pairs)
    scorer = Scorer([], manifest.steps, manifest.spec.seeds.count)
    for block in blocks:
        scorer.add(block, reduction.floor)
    scorer.finish(reduction)
    if bad := [*gathered.bad, *witnesses.bad]:
        raise FimoError(f"{bad[0][1]}; `{typed}` computes it again")
    gold = gold_of(reduction, scorer, manifest.steps, steps, metric)
    # The stamp of the attribution alone: which estimators the sweep itself has moves no score here.
    made_from = stamp(sweep, dataclasses.replace(manifest, estimators=()), listed)
    about = [manifest.digest, manifest.estimate_digest, made_from, SPLIT_SEED, metric, list(steps)]
    final_model = read_final(manifest.spec, Path(manifest.beside))
    return Trying(sweep, manifest, final_model, gold, Records(sweep, digest(about)))
