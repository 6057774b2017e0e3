"""An estimator's values in a worker: one block of them for its task, or all blocks for whoever commits none."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fimo.estimators import REGISTRY
from fimo.orchestrator.resolve.resolved import Resolved
from fimo.orchestrator.run import estimating
from fimo.orchestrator.run.blocks import assemble, common_steps, runs_of, shares, value_digest
from fimo.orchestrator.run.prepared import engine_of, pick, prepared
from fimo.orchestrator.run.provenance import peak_host_bytes, provenance
from fimo.orchestrator.run.proving import Proven
from fimo.orchestrator.run.results import CannotEstimateError
from fimo.orchestrator.run.work import EstimateTask
from fimo.orchestrator.sweep import estimates, keys
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables.score import EstimateMatrix
from fimo.workers.device import clock, deterministic, device_name, forget_peak, peak, prepare_environment
from fimo.workers.errors import DivergedError, UsageError, WorkloadError


@dataclass(frozen=True)
class Estimated:
    """An estimator's values for every removal and evaluation example.

    Attributes:
        seconds: of the device; ``notes``: the estimator's own, of its first block.
    """

    matrix: EstimateMatrix
    seconds: float
    device: str
    notes: Mapping[str, Any]


def estimate_whole(
    sweep: Sweep, manifest: Manifest, final_model: bytes | None, estimator: str, params: str, gpu: int = 0
) -> Estimated:
    """An estimator's values on the whole sweep, computed as its tasks would and committed nowhere.

    Args:
        manifest: with its removals; ``final_model`` and ``gpu`` as for ``run_task``.

    Raises:
        CannotEstimateError: it does not apply, or its values are not finite.
        FimoError: in one line.
    """
    prepare_environment()
    # Whoever names an estimator gives it no budget.
    named = dataclasses.replace(manifest, spec=manifest.spec.model_copy(update={"estimators": ()}))
    resolved = prepared(named, final_model)
    device = pick(manifest, gpu)
    blocks = []
    for seed, first, count in shares(manifest, estimator, params):
        task = EstimateTask(estimator, params, manifest.removals, first, count, count == manifest.evals, seed)
        blocks.append(estimate_block(sweep, resolved, device, task)[0])
    seeds = runs_of(manifest, estimator, params)
    values = assemble(blocks, manifest, seeds)
    if values is None:
        raise CannotEstimateError("its values do not cover every removal and evaluation example")
    seconds = sum(float(block.provenance["device_seconds"]) for block in blocks)
    matrix = EstimateMatrix(estimator, params, values, common_steps(blocks, seeds))
    return Estimated(matrix, seconds, device_name(device), dict(blocks[0].provenance["notes"]))


def estimate_block(
    sweep: Sweep, resolved: Resolved, device: torch.device, task: EstimateTask
) -> tuple[estimates.EstimateBlock, tuple[str, ...]]:
    """The values of a block, and what a person should know of them."""
    manifest = resolved.manifest
    digest = value_digest(manifest, task.estimator, task.params, task.at)
    forget_peak(device)
    removals, span, said = [r.indices for r in task.removals], (task.first, task.count), list[str]()
    named = task.estimator, task.params
    try:
        with deterministic(device) as flags:
            # The proof is the sweep's, and no cost of the estimator's; nor is loading the data, or the budget's timing.
            run, engine = _run(sweep, resolved, device, task)
            tasks = _budgeted(sweep, manifest, task)
            asked = estimating.asked(resolved, device, *named, removals, span, said.append, run, tasks, task.at)
            read = clock(device)
            began = read()
            estimate = asked()
            spent = read() - began
    except (DivergedError, UsageError, WorkloadError) as error:
        raise CannotEstimateError(without_name(str(error))) from error
    about = {
        **provenance(device, resolved, flags),
        **({} if engine is None else {"engine": dict(engine.record)}),
        "notes": json.loads(json.dumps(dict(estimate.notes), default=str)),
        "device_seconds": spent,
        "peak_bytes": peak(device) or peak_host_bytes(),
    }
    block = estimates.EstimateBlock(
        digest=digest,
        estimator=task.estimator,
        params=task.params,
        removals=task.removals,
        first=task.first,
        steps=estimate.steps,
        values=estimate.values.numpy(),
        provenance=about,
        seed=task.seed,
    )
    warned = tuple(line for line in said if line.startswith("warning")) + (engine.lines if engine is not None else ())
    return block, warned


def without_name(line: str) -> str:
    """An estimator's complaint without its own name in front, since whoever tells it names the task.

    The name may be that of the estimator that it is built on: lissa's, of lissa_h.
    """
    before, colon, rest = line.partition(": ")
    return rest if colon and before.removeprefix("estimator ") in REGISTRY else line


def _budgeted(sweep: Sweep, manifest: Manifest, task: EstimateTask) -> int | None:
    """How many tasks like this one there are, of an estimator that nobody named; else None.

    What has begun goes on: a second timing would drop an estimator at the budget's edge with half of its values there.
    """
    if manifest.spec.estimators is not None or task.at is not None:
        return None
    prefix = keys.estimates(
        sweep.name, value_digest(manifest, task.estimator, task.params), task.estimator, task.params
    )
    if any(sweep.store.list(prefix)):
        return None
    return sum(1 for _ in shares(manifest, task.estimator, task.params))


def _run(
    sweep: Sweep, resolved: Resolved, device: torch.device, task: EstimateTask
) -> tuple[estimating.Run | None, Proven | None]:
    """What one seed's share of an estimate is trained with, and the engine if it trains in the sweep's stacks."""
    if task.seed is None:
        return None, None
    if not REGISTRY[task.estimator].trains:
        return estimating.Run(task.seed), None
    engine = engine_of(sweep, resolved, device, tuple(r.indices for r in task.removals))
    return estimating.Run(task.seed, engine.start, engine.replicas), engine
