"""What a worker does for a witness task: how many of its removals are worth their cost, and their training.

The number of witnesses is planned by counting cells (``run/witness_plan.py``). A float64 cell may cost far more than
two in float32 (on a GPU up to 64 times), so a worker times both before it trains, if the spec leaves the number open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fimo.orchestrator.resolve.resolved import Resolved
from fimo.orchestrator.run.plan import trained_cells
from fimo.orchestrator.run.proving import Proven
from fimo.orchestrator.run.results import NoWitnessError
from fimo.orchestrator.run.witness_plan import WITNESS_SHARE, spread_evenly, witness_tasks
from fimo.orchestrator.run.work import WitnessTask
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.device import clock
from fimo.workers.shard import ShardResult
from fimo.workers.witness import Witness, beside, seconds_a_cell_step, train_moved, train_witness, witness_start

CHEAP_S = 10.0
"""Seconds that a seed's witnesses may take whatever the sweep costs: below, nothing is dropped and nothing timed twice.

So on small models the number of witnesses, and with it every table, is the same from run to run.
"""
DEAR_S = 60.0
"""Seconds from which on not even one witness is trained, if it is beyond its share of the sweep."""


@dataclass(frozen=True)
class Witnessed:
    """A seed's witnesses.

    Attributes:
        removals: those of the task that were trained again, then the moved ones, in the result's order.
        about: how, for the provenance.
    """

    result: ShardResult
    removals: tuple[NamedRemoval, ...]
    about: Mapping[str, Any]


def witnessed(sweep: Sweep, resolved: Resolved, engine: Proven, task: WitnessTask) -> Witnessed:
    """Train a seed's witnesses, as many as are worth their cost.

    Raises:
        NoWitnessError: not even one is.
        WorkloadError, DivergedError: see ``fimo.workers.witness.witness_start``.
    """
    witness = witness_start(resolved.workload, resolved.state, engine.start)
    removals = task.removals
    if resolved.spec.resources.witnesses == "auto":
        removals = _worth(sweep, resolved, engine, witness, removals)
    read = clock(engine.start.model.device)
    began = read()
    result = train_witness(witness, [r.indices for r in removals], task.seed, engine.replicas)
    if task.moved:
        indices = [r.indices for r in task.moved]
        moved = train_moved(resolved.workload, engine.start, indices, task.seed, engine.replicas)
        result = beside(result, moved)
    about = {
        "witness": witness.how,
        "moved": len(task.moved),
        "dtype": str(witness.start.model.dtype).removeprefix("torch."),
        "replicas": result.replicas,
        "engine": dict(engine.record),
        "device_seconds": read() - began,
    }
    return Witnessed(result, (*removals, *task.moved), about)


def _worth(
    sweep: Sweep, resolved: Resolved, engine: Proven, witness: Witness, removals: tuple[NamedRemoval, ...]
) -> tuple[NamedRemoval, ...]:
    """As many of the removals as take ``CHEAP_S``, or this seed's share of ``WITNESS_SHARE`` of the sweep."""
    share: float | None = None
    for count in range(len(removals), 0, -1):
        kept = tuple(spread_evenly(removals, count))
        seconds = _seconds(resolved, witness, kept, engine.replicas)
        if seconds <= CHEAP_S:
            return kept
        share = _share(sweep, resolved, engine, kept) if share is None else share
        if seconds <= share or (count == 1 and seconds <= DEAR_S):
            return kept
    raise NoWitnessError(
        f"one cell {witness.how} and its baseline take {seconds:.0f} s here, more than {WITNESS_SHARE:.0%} of what the "
        "sweep takes; `resources: {witnesses: 1}` trains them all the same"
    )


def _seconds(resolved: Resolved, witness: Witness, removals: tuple[NamedRemoval, ...], replicas: int) -> float:
    """What training the removals and their baseline again will take, by a few steps of it."""
    each = seconds_a_cell_step(witness.start, [r.indices for r in removals], replicas)
    return each * resolved.manifest.steps[-1] * (len(removals) + 1)


def _share(sweep: Sweep, resolved: Resolved, engine: Proven, removals: tuple[NamedRemoval, ...]) -> float:
    """Seconds that one seed's witnesses may take: their part of ``WITNESS_SHARE`` of the whole sweep."""
    # A task's own manifest carries no removals.
    manifest = sweep.read_manifest()
    if manifest.digest != resolved.manifest.digest:
        # Another run has put its own there since: what this sweep costs cannot be told.
        return torch.inf
    lanes = [r.indices for r in removals] * -(-engine.replicas // len(removals))
    each = seconds_a_cell_step(engine.start, lanes, engine.replicas)
    cells = trained_cells(manifest, len(manifest.removals))
    return WITNESS_SHARE * each * manifest.steps[-1] * cells / len(witness_tasks(manifest))
