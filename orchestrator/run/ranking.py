"""``fimo rank``: every training example ranked for every evaluation example, and the top verified by new cells.

    choose      the estimator with the best normalised score on half of the evaluation examples, scored on the others
    estimate    all n training examples at one step, in tasks that are resumed like any
    calibrate   effects and intervals, on the leave-one-out cells that the sweep has
    verify      the top k of both signs, trained as cells of the sweep, until what is printed is what was verified, or
                a share of the cells of brute force is spent

A derived manifest says what is wanted of each stage: the sweep's, with other removals and one estimator.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fimo.estimators import REGISTRY
from fimo.orchestrator.resolve.loading import read_final
from fimo.orchestrator.resolve.resolved import Resolved
from fimo.orchestrator.run.blocks import Named, assemble, common_steps, listed_blocks, runs_of, value_digest, wanted
from fimo.orchestrator.run.driver import Listener, note_sets
from fimo.orchestrator.run.failures import Failures
from fimo.orchestrator.run.owed import current_plan, missing_estimates
from fimo.orchestrator.run.places import Pool
from fimo.orchestrator.run.reading import Gathered, seed_blocks
from fimo.orchestrator.run.schedule import drive
from fimo.orchestrator.run.witnesses import read_witnesses
from fimo.orchestrator.run.work import Task
from fimo.orchestrator.run.written import listed_parts
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.parts import BadPartError
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables.agreement import undefined
from fimo.orchestrator.tables.calibration import Calibration, calibrate, coverage
from fimo.orchestrator.tables.ranking import Choice, candidates, choose
from fimo.orchestrator.tables.reduce import reduce
from fimo.orchestrator.tables.reliability import trust_at
from fimo.workers.errors import FimoError, UsageError

Array = NDArray[np.float64]
Where = Callable[[Sweep, Manifest, bytes | None], AbstractContextManager[Pool]]

VALUES = 2**23
"""Values in one block of estimates at most: 64 MiB."""
SHARE = 5
"""One training example in so many is verified at most, unless the caller says otherwise."""
FEWEST = 10
"""Leave-one-out removals that a calibration is made on at least."""
TOO_DEAR = ("unrolled",)
"""Estimators that are ranked by only if they are named: a tangent for every training example."""


@dataclass
class Known:
    """Effects that the gold standard has measured at the ranking's step, by training index.

    Attributes:
        effect, sem: index -> (m,) of the sweep's evaluation examples; ``seeds``: index -> how many.
        ceilings: the highest cosine against these effects, (m,); None with one seed.
    """

    effect: dict[int, Array] = field(default_factory=dict)
    sem: dict[int, Array] = field(default_factory=dict)
    seeds: dict[int, int] = field(default_factory=dict)
    ceilings: Array | None = None

    def take(self, other: Known) -> None:
        """Know what the other knows too."""
        self.effect.update(other.effect)
        self.sem.update(other.sem)
        self.seeds.update(other.seeds)

    def matrix(self, indices: Sequence[int]) -> Array:
        """Effects (len(indices), m)."""
        return np.stack([self.effect[index] for index in indices])


@dataclass(frozen=True)
class Ranked:
    """A ranking, before it is written.

    Attributes:
        estimator: name and canonical params; ``choice``: how it was chosen, None if it was named.
        step: the amount; ``evals``: numbers of the evaluation examples; ``k``: how many of each sign are verified.
        values: the estimator's, float64 (evals, n), in a file of its own and not in memory.
        calibration: over ``evals``; ``covered``: measured coverage and its standard error, None if it takes more.
        known: what is measured, the sweep's own cells and those trained here; ``trained``: cells trained here.
        brute: cells that training every example would have taken.
        left: places in a top k that are not verified, because the cells were spent.
    """

    estimator: Named
    choice: Choice | None
    step: int
    evals: tuple[int, ...]
    k: int
    values: Array
    calibration: Calibration
    covered: tuple[float, float] | None
    known: Known
    trained: int
    brute: int
    left: int


def rank(
    resolved: Resolved,
    sweep: Sweep,
    where: Where,
    listener: Listener,
    evals: Sequence[int] | None = None,
    named: Named | None = None,
    k: int = 10,
    step: int | None = None,
    cells: int | None = None,
    should_stop: Callable[[], str | None] = lambda: None,
) -> Ranked:
    """Rank all n training examples for the evaluation examples ``evals`` (default: the sweep's).

    Args:
        named: the estimator; None = chosen by its score.
        k: the most helpful and most harmful that are verified for each evaluation example.
        step: the recorded step; None = the last.
        cells: to train for verifying at most; None = a fifth of the brute force's. What most evaluation examples ask
            for comes first.

    Raises:
        UsageError: no such step or evaluation example, or too few leave-one-out cells to calibrate on.
        FimoError: a task failed, or was stopped: what is committed stays, and the same command goes on.
    """
    manifest = resolved.manifest
    step = manifest.steps[-1] if step is None else step
    if step not in manifest.steps:
        raise UsageError(f"step {step} is not recorded; the sweep has {list(manifest.steps)[:12]}")
    places = tuple(range(manifest.evals)) if evals is None else tuple(dict.fromkeys(evals))
    outside = [e for e in places if not 0 <= e < manifest.evals]
    if outside or not places:
        raise UsageError(f"evaluation examples run from 0 to {manifest.evals - 1}, got {outside[:5]}")
    single = replace(manifest, removals=tuple(r for r in manifest.removals if len(r.indices) == 1))
    known, without = measured(sweep, single, step, listener.say)
    if len(known.effect) < FEWEST:
        raise UsageError(
            f"{len(known.effect)} leave-one-out removals have all their cells; a ranking is calibrated on at least "
            f"{FEWEST}: add single indices to removals, and run the spec"
        )
    with contextlib.ExitStack() as opened:
        compute = _computing(sweep, manifest, where, listener, should_stop, opened)
        choice, estimator = None, named
        if estimator is None:
            choice, estimator = _chosen(sweep, single, step, known, without)
        values = _all_values(sweep, manifest, estimator, step, compute, places)
        rows = sorted(known.effect)
        gold = known.matrix(rows)[:, list(places)]
        sems = np.stack([known.sem[index] for index in rows])[:, list(places)]
        own = np.array(values[:, rows]).T
        calibration, covered = calibrate(own, gold, sems), coverage(own, gold)
        brute, trained = manifest.train * manifest.spec.seeds.count, 0
        most = manifest.train // SHARE if cells is None else cells // manifest.spec.seeds.count
        while asked := _to_verify(values, calibration, known, places, k):
            wanted = sorted(sorted(asked, key=lambda index: (-asked[index], index))[: most - trained])
            if not wanted:
                break
            listener.say(f"verifying {len(wanted)} training examples, {len(known.effect)} are measured")
            of = replace(manifest, removals=_singles(wanted), estimators=())
            compute(of, list(current_plan(of, sweep).shards))
            fresh, _ = measured(sweep, of, step, listener.say)
            lacking = [index for index in wanted if index not in fresh.effect]
            if lacking:
                raise FimoError(
                    f"training example {lacking[0]} has no finite effect at step {step}: it cannot be verified"
                )
            known.take(fresh)
            trained += len(wanted)
    trained, left = trained * manifest.spec.seeds.count, sum(asked.values())
    return Ranked(estimator, choice, step, places, k, values, calibration, covered, known, trained, brute, left)


Compute = Callable[[Manifest, list[Task]], None]
"""Has tasks of a derived manifest done; raises FimoError if one fails, or all are stopped."""


def _computing(
    sweep: Sweep,
    manifest: Manifest,
    where: Where,
    listener: Listener,
    should_stop: Callable[[], str | None],
    opened: contextlib.ExitStack,
) -> Compute:
    """One pool for all stages, opened when the first task comes: a task carries its own removals and estimator."""
    pools: list[Pool] = []

    def compute(of: Manifest, tasks: list[Task]) -> None:
        if not tasks:
            return
        if not pools:
            final_model = read_final(manifest.spec, Path(manifest.beside))
            pools.append(opened.enter_context(where(sweep, manifest, final_model)))
        listener.start(current_plan(of, sweep), len(tasks))
        note_sets(of, sweep, tasks)
        outcome = drive(tasks, pools[0], listener.result, should_stop)
        if outcome.set_aside or outcome.stopped:
            why = outcome.set_aside[0].line if outcome.set_aside else str(outcome.stopped)
            raise FimoError(f"{why}; what is done is kept, and the same command goes on from it")

    return compute


def measured(
    sweep: Sweep, manifest: Manifest, step: int, say: Callable[[str], None]
) -> tuple[Known, NDArray[np.bool_]]:
    """The effects of single removals of which every seed is there, at one step; and where they say nothing, (m,)."""
    place, r = manifest.steps.index(step), len(manifest.removals)
    parts = listed_parts(sweep, manifest)
    blocks = seed_blocks(sweep, manifest, parts, Gathered({}), [], say)
    pairs = read_witnesses(sweep, manifest, parts).pairs
    blocks, reduction = reduce(blocks, r, len(manifest.steps), manifest.evals, pairs)
    for _ in blocks:
        pass
    known, sem = Known(), reduction.effects.sem()
    for row, removal in enumerate(manifest.removals):
        count = int(reduction.effects.count[row, place])
        if count == manifest.spec.seeds.count:
            [index] = removal.indices
            known.effect[index] = reduction.effects.mean[row, place]
            known.sem[index], known.seeds[index] = sem[row, place], count
    trust = trust_at(reduction, np.array([r.indices[0] in known.effect for r in manifest.removals]), place, "baseline")
    if trust is not None:
        known.ceilings = trust.ceiling()
    floor = reduction.floors.of_mean(len(reduction.seeds))[place]
    without = np.ones(manifest.evals, dtype=np.bool_)
    if known.effect:
        gold = known.matrix(sorted(known.effect))
        without = np.asarray(undefined(gold[:, None], floor[None])[0])
    return known, without


def _chosen(
    sweep: Sweep, manifest: Manifest, step: int, known: Known, without: NDArray[np.bool_]
) -> tuple[Choice, Named]:
    """Of the sweep's own estimators the one with the best normalised score; see ``tables.ranking.choose``."""
    rows = [place for place, r in enumerate(manifest.removals) if r.indices[0] in known.effect]
    gold = known.matrix([manifest.removals[place].indices[0] for place in rows])
    names: list[Named] = []
    matrices: list[Array] = []
    for named, values in _sweeps_own(sweep, manifest, step):
        if named[0] not in TOO_DEAR:
            names.append(named)
            matrices.append(values[rows])
    choice = choose(matrices, gold, known.ceilings, without) if names else None
    if choice is None:
        raise UsageError("no estimator of the sweep is complete and defined at the step: name one with --estimator")
    return choice, names[choice.place]


def _sweeps_own(sweep: Sweep, manifest: Manifest, step: int) -> Iterator[tuple[Named, Array]]:
    """(estimator, its values (R, m) at the step) of those that are complete."""
    for named, entries in listed_blocks(sweep, manifest):
        digest = value_digest(manifest, *named)
        blocks = []
        for entry in entries:
            try:
                blocks.append(sweep.read_block(entry.key, digest, *named))
            except BadPartError:
                continue
        blocks, seeds = wanted(blocks, manifest), runs_of(manifest, *named)
        values, steps = assemble(blocks, manifest, seeds), common_steps(blocks, seeds)
        if values is None or (steps is not None and step not in steps):
            continue
        yield named, values if steps is None else values[steps.index(step)]


def _all_values(
    sweep: Sweep,
    manifest: Manifest,
    estimator: Named,
    step: int,
    compute: Compute,
    evals: Sequence[int],
) -> Array:
    """An estimator's values of all n training examples at one step, float64 (evals, n), mapped from a nameless file."""
    n = manifest.train
    # What trains runs of its own reads all training examples in one; what takes gradients may take them in blocks.
    size = n if REGISTRY[estimator[0]].trains else max(1, min(n, VALUES // max(1, manifest.evals)))
    spans = [range(first, min(first + size, n)) for first in range(0, n, size)]
    wanted = [replace(manifest, removals=_singles(span), estimators=(estimator,)) for span in spans]
    tasks: list[Task] = []
    for of in wanted:
        tasks += missing_estimates(of, sweep, Failures((), {}), step)
    compute(wanted[0], tasks)
    with tempfile.TemporaryFile() as file:
        values = np.memmap(file, dtype=np.float64, mode="w+", shape=(len(evals), n))
    for of, span in zip(wanted, spans, strict=True):
        digest, seeds = value_digest(of, *estimator, step), runs_of(of, *estimator)
        [(_, entries)] = listed_blocks(sweep, of, step)
        blocks = [sweep.read_block(entry.key, digest, *estimator) for entry in entries]
        found = assemble(blocks, of, seeds)
        if found is None or (found.ndim == 3 and len(found) != 1):
            raise FimoError(f"estimator {estimator[0]} has no values at step {step}")
        values[:, span.start : span.stop] = (found if found.ndim == 2 else found[0])[:, list(evals)].T
    return values


def _singles(indices: Sequence[int] | range) -> tuple[NamedRemoval, ...]:
    return tuple(NamedRemoval(index, str(index), (index,)) for index in indices)


def _to_verify(values: Array, calibration: Calibration, known: Known, evals: Sequence[int], k: int) -> Counter[int]:
    """Training indices that stand unmeasured in the top k of an evaluation example, with how many those are."""
    wanted: Counter[int] = Counter()
    for place, number in enumerate(evals):
        effect, low, high = (x[:, 0] for x in calibration.at(place).effects(values[place][:, None]))
        verified = of_eval(known.effect, number, len(effect))
        wanted.update(candidates(effect, low, high, verified, k).must.tolist())
    return wanted


def of_eval(known: dict[int, Array], place: int, n: int) -> Array:
    """What is known of one evaluation example, (n,), NaN where nothing is."""
    column = np.full(n, np.nan)
    for index, row in known.items():
        column[index] = row[place]
    return column
