"""``fimo amount``: what each recorded amount of further training is worth, read from a sweep's store and from a few
cells trained at other removal weights (``run/weighing.py``). The arithmetic is in ``fimo.orchestrator.tables``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fimo.orchestrator.resolve.at_hand import HERE, Own
from fimo.orchestrator.resolve.resolved import resolve_again
from fimo.orchestrator.run.blocks import Named
from fimo.orchestrator.run.driver import Listener, Where
from fimo.orchestrator.run.gather import current_tables
from fimo.orchestrator.run.owed import current_plan
from fimo.orchestrator.run.reading import Gathered, seed_blocks
from fimo.orchestrator.run.weighing import Weighed, weigh
from fimo.orchestrator.run.written import listed_parts
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.parts import BadPartError
from fimo.orchestrator.sweep.sweep import Listed, Sweep
from fimo.orchestrator.tables.advice import DROWNED, RELIABLE, Advice, advise
from fimo.orchestrator.tables.amounts import (
    Agreements,
    Amount,
    amounts,
    compared,
    finite_steps,
    limit_of,
    neighbours,
    share,
    thinned,
)
from fimo.orchestrator.tables.compare import compare, cut
from fimo.orchestrator.tables.reduce import reduce
from fimo.orchestrator.tables.score import EstimateMatrix, Scorer
from fimo.workers.errors import UsageError

Array = NDArray[np.float64]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Amounts:
    """What a sweep's amounts are worth.

    Attributes:
        sweep: STORE/NAME; ``recorded``: how many steps it recorded, of which ``amounts`` are looked at.
        limit: what stands for the infinitesimal limit.
        weighed: the cells at other removal weights; None if there are none.
        complete: every cell of the sweep is there.
        notes: what a reader must know.
    """

    sweep: str
    recorded: int
    amounts: tuple[Amount, ...]
    limit: str
    weighed: Weighed | None
    advice: Advice
    complete: bool
    notes: tuple[str, ...]


def how_much(
    sweep: Sweep,
    where: Where,
    listener: Listener,
    train: bool = True,
    should_stop: Callable[[], str | None] = lambda: None,
    own: Own = HERE,
) -> Amounts:
    """Look at a finished or partial sweep's amounts, and recommend.

    Args:
        train: train a few cells at other removal weights; False = metasmoothness and linearity stay unknown.
        own: where the user has the sweep's code.

    Raises:
        UsageError: there is no such sweep, no cell of it, or its code is not here.
        FimoError: a task failed, or was stopped: what is committed stays, and the same command goes on.
    """
    manifest, notes = sweep.read_manifest(), list[str]()
    listed = listed_parts(sweep, manifest)
    if not listed:
        raise UsageError(f"{sweep.uri} has no cell yet: `fimo resume {sweep.uri}` trains them")
    resolved = resolve_again(sweep, own) if train else None
    tables, _ = current_tables(sweep, manifest, listener.say)
    steps = thinned(manifest.steps)
    finite = finite_steps(tables["attribution"], steps)
    if len(finite) < len(steps):
        tables = _tables_of(sweep, manifest, listed, tables, finite, listener.say)
    distances, scale = _distances(sweep, manifest, listed)
    found = amounts(tables, steps, distances, scale, RELIABLE)
    if len(steps) < len(manifest.steps):
        notes.append(
            f"{len(steps)} of {len(manifest.steps)} recorded steps are looked at, evenly spaced on a log scale"
        )
    estimate = first_order(manifest)
    start = None if estimate is not None and limit_of(tables["scores"], *estimate) else _first_reliable(found)
    agreements = _agreements(sweep, manifest, listed, finite, start, listener.say)
    limit, said = _limit(tables["scores"], estimate, start, agreements)
    found = compared(found, {pair: agreements.get(pair) for pair in neighbours(steps)}, limit)
    weighed = None
    if resolved is not None:
        weighed = weigh(resolved, sweep, where, listener, should_stop)
        notes += weighed.notes
        found = [replace(a, **weighed.at(a.step)) for a in found]
    complete = not current_plan(manifest, sweep).missing
    if not complete:
        notes.append(f"the sweep is incomplete; `fimo resume {sweep.uri}` computes the rest")
    return Amounts(sweep.uri, len(manifest.steps), tuple(found), said, weighed, advise(found), complete, tuple(notes))


def _tables_of(
    sweep: Sweep,
    manifest: Manifest,
    listed: Sequence[Listed],
    tables: Mapping[str, pa.Table],
    finite: list[int],
    say: Say,
) -> dict[str, pa.Table]:
    """The tables with trust and scores of ``finite`` steps alone: one run that is not finite anywhere has its seed, or
    its removal, left out of them everywhere."""
    named = first_order(manifest)
    own = [e for e in [_estimate(tables["estimates"], manifest, named)] if e is not None]
    scorer = Scorer(own, finite, len({part.seed for part in listed}))
    places = [manifest.steps.index(step) for step in finite]
    blocks = cut(seed_blocks(sweep, manifest, listed, Gathered({}), [], say), places, manifest.evals)
    blocks, reduction = reduce(blocks, len(manifest.removals), len(finite), manifest.evals)
    for block in blocks:
        scorer.add(block, reduction.floor)
    scorer.finish(reduction)
    return {**tables, "reliability": scorer.reliability_table(), "scores": scorer.table()}


def _estimate(estimates: pa.Table, manifest: Manifest, named: Named | None) -> EstimateMatrix | None:
    if named is None:
        return None
    rows = [r for r in estimates.to_pylist() if (r["estimator"], r["params"]) == named]
    shape = len(manifest.removals), manifest.evals
    if len(rows) != shape[0] * shape[1]:
        return None
    return EstimateMatrix(*named, np.array([r["value"] for r in rows]).reshape(shape))


def first_order(manifest: Manifest) -> Named | None:
    """The sweep's estimate of the infinitesimal limit: Grad-Dot, under Adam in the optimizer's own scale; or None."""
    scaled = None if manifest.spec.further_training.optimizer.name == "sgd" else "optimizer"
    for name, params in manifest.estimators:
        if name == "grad_dot" and json.loads(params).get("preconditioner") == scaled:
            return name, params
    return None


def _first_reliable(found: Sequence[Amount]) -> int | None:
    good = (
        a.step
        for a in found
        if not a.exploded
        and (a.reliability or 0) >= RELIABLE
        and a.under_floor is not None
        and a.under_floor <= DROWNED
    )
    return next(good, None)


def _limit(
    scores: pa.Table, estimate: Named | None, start: int | None, agreements: Agreements
) -> tuple[dict[int, float | None], str]:
    """Step -> agreement with the infinitesimal limit, and what stands for it."""
    if estimate is not None:
        found = limit_of(scores, *estimate)
        if found:
            scale = " in the optimizer's own scale" if json.loads(estimate[1]).get("preconditioner") else ""
            return found, f"grad_dot{scale}"
    if start is None:
        return {}, "nothing: no grad_dot among the estimates, no reliable amount"
    return {later: value for (earlier, later), value in agreements.items() if earlier == start}, f"step {start}"


def _agreements(
    sweep: Sweep, manifest: Manifest, listed: Sequence[Listed], finite: list[int], start: int | None, say: Say
) -> Agreements:
    """Of neighbours, and of ``start`` with what comes after it. All share their seeds' noise, which is taken out."""
    pairs = neighbours(finite) + ([(start, step) for step in finite if step > start] if start is not None else [])
    pairs = list(dict.fromkeys(pairs))
    if not pairs:
        return {}
    blocks = itertools.tee(seed_blocks(sweep, manifest, listed, Gathered({}), [], say))
    own, other = (
        cut(stream, [manifest.steps.index(pair[side]) for pair in pairs], manifest.evals)
        for side, stream in enumerate(blocks)
    )
    table = compare(own, other, len(manifest.removals), pairs, manifest.evals)
    return {
        (row["step"], row["other_step"]): share(row["normalised"], row["joint_ceiling"])
        for row in table.to_pylist()
        if (row["metric"], row["adjust"]) == ("cosine", "baseline")
    }


def _distances(sweep: Sweep, manifest: Manifest, listed: Sequence[Listed]) -> tuple[dict[int, float], float]:
    """Step -> the baseline's ‖Δθ_t‖, mean over seeds, where it is finite; and the size of g at θᶠ."""
    by_seed: dict[int, Array] = {}
    scale = 0.0
    for item in listed:
        if item.seed in by_seed:
            continue
        try:
            part = sweep.read_part(item.key, manifest)
        except BadPartError:
            continue
        by_seed[item.seed], scale = part.distances[-2], max(scale, part.scale)
    if not by_seed:
        return {}, scale
    mean = np.mean(list(by_seed.values()), axis=0)
    return {step: float(d) for step, d in zip(manifest.steps, mean, strict=True) if np.isfinite(d)}, scale
