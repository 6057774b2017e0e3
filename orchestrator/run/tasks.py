"""What runs in a worker process: a shard, a block of estimates or a seed's witnesses, from manifest to committed bytes.

A task returns a receipt (key, counts, timings), never data: everything of value is in the store before it returns. Ray
is not imported here; the same functions run in process under test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fimo.estimators import REGISTRY
from fimo.orchestrator.resolve.resolved import Resolved, resolve_like
from fimo.orchestrator.run import estimating, shards
from fimo.orchestrator.run.blocks import assemble, common_steps, runs_of, shares, value_digest
from fimo.orchestrator.run.plan import EstimateTask, Shard, Together, WitnessTask, Work, tasks_in
from fimo.orchestrator.run.provenance import peak_host_bytes, provenance
from fimo.orchestrator.run.proving import Proven, proven
from fimo.orchestrator.run.witnessing import witnessed
from fimo.orchestrator.store import NotFound
from fimo.orchestrator.sweep import estimates, keys, parts
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables.score import EstimateMatrix
from fimo.workers.amounts import Removal
from fimo.workers.device import clock, deterministic, device_name, forget_peak, peak, pick_device, prepare_environment
from fimo.workers.errors import DivergedError, FimoError, UsageError, WorkloadError


class UnableError(FimoError):
    """A node cannot begin a task: it lacks a package or a file, or its code or data are others.

    Attributes:
        node: Ray's id of it; empty in a process of the driver's own.
    """

    def __init__(self, line: str, node: str = "") -> None:
        super().__init__(line, node)
        self.node = node

    def __str__(self) -> str:
        return str(self.args[0])


class CannotEstimateError(FimoError):
    """An estimator cannot give values for this model: no other try, moment or machine changes that."""


@dataclass(frozen=True)
class Receipt:
    """What a finished task says of itself.

    Attributes:
        key: the committed object.
        written: by this task, rather than met there.
        cells: in it, 0 for estimates and witnesses; ``diverged``: how many of its runs were not finite.
        seconds: wall time of the task.
        lines: what a person should know of it.
        node: Ray's id of where it ran; empty in a process of the driver's own.
        each: the receipts of shards that were done together, in their order; the rest is then said of all of them.
    """

    key: str
    written: bool
    cells: int
    diverged: int
    seconds: float
    device: str
    lines: tuple[str, ...] = ()
    node: str = ""
    each: tuple[Receipt, ...] = ()


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


def run_task(sweep: Sweep, manifest: Manifest, final_model: bytes | None, task: Work, gpu: int = 0) -> Receipt:
    """Compute and commit one task.

    Args:
        manifest: the driver's; its list of removals is not looked at, since a task carries its own.
        final_model: the bytes of θᶠ's file; not looked at if ``is_prepared(manifest)``.
        gpu: which of the GPUs that torch sees is this task's.

    Raises:
        FimoError: in one line; ConflictError if different rows are already committed under the key.
    """
    prepare_environment()
    resolved = prepared(manifest, final_model)
    device = pick(manifest, gpu)
    if isinstance(task, Shard | Together):
        return _shards(sweep, resolved, device, task)
    if isinstance(task, WitnessTask):
        return _witness(sweep, resolved, device, task)
    return _estimate(sweep, resolved, device, task)


# One sweep at a time in a process: the next one's model and data replace this one's.
_loaded: dict[tuple[str, ...], Resolved] = {}
_engines: dict[tuple[object, ...], Proven] = {}


def is_prepared(manifest: Manifest) -> bool:
    """Whether this process holds the sweep's model and data already."""
    return _sweep_of(manifest) in _loaded


def _sweep_of(manifest: Manifest) -> tuple[str, ...]:
    return manifest.digest, manifest.beside, manifest.spec.name


def prepared(manifest: Manifest, final_model: bytes | None) -> Resolved:
    """The sweep's model and data in this process, loaded once; errors as ``resolve_like``."""
    name = _sweep_of(manifest)
    if name not in _loaded:
        _loaded.clear()
        _engines.clear()
        try:
            resolved = resolve_like(manifest, final_model)
        except (UsageError, WorkloadError, ImportError) as error:
            # The driver could: it is the node's fault, or something has changed since.
            line = str(error) if isinstance(error, FimoError) else f"{type(error).__name__}: {error}"
            here = f"node {platform.node()}"
            raise UnableError(line if line.startswith(here) else f"{here}: {line}") from error
        # torch loads its function transforms on first use: a second that no estimator should be charged with.
        torch.func.vmap(torch.func.grad(lambda x: x * x))(torch.ones(1))
        _loaded[name] = resolved
    # Of an equal digest, resources may differ.
    return dataclasses.replace(_loaded[name], manifest=manifest)


def pick(manifest: Manifest, gpu: int) -> torch.device:
    """The device of a task, with its threads set."""
    torch.set_num_threads(max(1, int(manifest.spec.resources.cpus)))
    return _device(manifest.spec.resources.gpus, gpu)


def _device(gpus: float, number: int) -> torch.device:
    """The task's device; a share of a GPU bounds this process's memory there to the same share."""
    device = pick_device(gpus)
    if device.type != "cuda":
        return device
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    if gpus < 1:
        torch.cuda.set_per_process_memory_fraction(gpus, device)
    return device


def engine_of(sweep: Sweep, resolved: Resolved, device: torch.device, removals: tuple[Removal, ...]) -> Proven:
    """What the sweep's cells share, with the engine that is proven for it; once a process."""
    asked = resolved.spec.resources
    name = (
        resolved.manifest.digest,
        str(device),
        asked.replay,
        asked.proof,
        asked.replicas,
        asked.shard,
        asked.together,
    )
    if name not in _engines:
        # A process that is given another GPU leaves none of its memory on the last one.
        _engines.clear()
        engine = proven(sweep, resolved, resolved.start(device), removals)
        _engines[name] = dataclasses.replace(engine, lines=())
        return engine
    return _engines[name]


# -- shards --------------------------------------------------------------------------------------------------------


def _shards(sweep: Sweep, resolved: Resolved, device: torch.device, task: Shard | Together) -> Receipt:
    started, manifest, owed = time.monotonic(), resolved.manifest, tasks_in(task)
    # A task whose receipt was lost with its worker, or that another driver was quicker at, is not computed again.
    there = [shards.met(sweep, manifest, shard) for shard in owed]
    every, lines = {done.shard: done for done in there if done is not None}, tuple[str, ...]()
    if left := {shard for shard in owed if shard not in every}:
        with deterministic(device) as flags:
            engine = engine_of(sweep, resolved, device, tuple(r.indices for r in owed[0].removals))
            together = task.shards if isinstance(task, Together) else owed
            every |= {done.shard: done for done in shards.train(sweep, resolved, engine, device, flags, together, left)}
        lines = engine.lines
    took, name = (time.monotonic() - started) / len(owed), device_name(device)
    each = [
        Receipt(done.key, done.written, len(shard.removals), done.diverged, took, name, lines if first else ())
        for first, shard, done in ((shard is owed[0], shard, every[shard]) for shard in owed)
    ]
    if not isinstance(task, Together):
        return each[0]
    cells, diverged = (sum(getattr(one, of) for one in each) for of in ("cells", "diverged"))
    written = any(one.written for one in each)
    return Receipt(each[0].key, written, cells, diverged, len(owed) * took, name, each=tuple(each))


# -- witnesses -----------------------------------------------------------------------------------------------------


def _witness(sweep: Sweep, resolved: Resolved, device: torch.device, task: WitnessTask) -> Receipt:
    started, manifest = time.monotonic(), resolved.manifest
    key = keys.witness(sweep.name, manifest.digest, task.seed)

    def receipt(written: bool, lines: tuple[str, ...] = ()) -> Receipt:
        return Receipt(key, written, 0, 0, time.monotonic() - started, device_name(device), lines)

    # As with parts: one that does not verify is the reduction's to set aside.
    with contextlib.suppress(NotFound):
        with contextlib.suppress(parts.BadPartError):
            sweep.read_witness(task.seed, manifest)
        return receipt(False)
    with deterministic(device) as flags:
        engine = engine_of(sweep, resolved, device, tuple(r.indices for r in task.removals))
        done = witnessed(sweep, resolved, engine, task)
    about = {
        **provenance(device, resolved, flags),
        **done.about,
        "peak_bytes": done.result.peak_bytes or peak_host_bytes(),
    }
    data, _ = parts.encode_part(done.result, done.removals, keys.witness_digest(manifest.digest), about)
    # Whoever was first is as good a witness.
    return receipt(sweep.store.create(key, data), engine.lines)


# -- estimates -----------------------------------------------------------------------------------------------------


def _estimate(sweep: Sweep, resolved: Resolved, device: torch.device, task: EstimateTask) -> Receipt:
    started, manifest = time.monotonic(), resolved.manifest
    digest = value_digest(manifest, task.estimator, task.params, task.at)
    prefix = keys.estimates(sweep.name, digest, task.estimator, task.params)
    key = keys.block(prefix, task.removals, task.first, task.count, task.seed)

    def receipt(written: bool, lines: tuple[str, ...] = ()) -> Receipt:
        return Receipt(key, written, 0, 0, time.monotonic() - started, device_name(device), lines)

    # As with parts: a block that does not verify is the reduction's to set aside.
    with contextlib.suppress(NotFound):
        with contextlib.suppress(parts.BadPartError):
            sweep.read_block(key, digest, task.estimator, task.params)
        return receipt(False)
    block, warned = _block(sweep, resolved, device, task)
    return receipt(sweep.store.create(key, estimates.encode_block(block)[0]), warned)


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
        blocks.append(_block(sweep, resolved, device, task)[0])
    seeds = runs_of(manifest, estimator, params)
    values = assemble(blocks, manifest, seeds)
    if values is None:
        raise CannotEstimateError("its values do not cover every removal and evaluation example")
    seconds = sum(float(block.provenance["device_seconds"]) for block in blocks)
    matrix = EstimateMatrix(estimator, params, values, common_steps(blocks, seeds))
    return Estimated(matrix, seconds, device_name(device), dict(blocks[0].provenance["notes"]))


def _block(
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
