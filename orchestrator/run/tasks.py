"""What runs in a worker process: a shard, a block of estimates or a seed's witnesses, from manifest to committed bytes.

A task returns a receipt (key, counts, timings), never data: everything of value is in the store before it returns. Ray
is not imported here; the same functions run in process under test.
"""

from __future__ import annotations

import contextlib
import time

import torch

from fimo.orchestrator.resolve.resolved import Resolved
from fimo.orchestrator.run import shards
from fimo.orchestrator.run.blocks import value_digest
from fimo.orchestrator.run.estimate_block import estimate_block
from fimo.orchestrator.run.prepared import engine_of, pick, prepared
from fimo.orchestrator.run.provenance import peak_host_bytes, provenance
from fimo.orchestrator.run.results import Receipt
from fimo.orchestrator.run.witnessing import witnessed
from fimo.orchestrator.run.work import EstimateTask, Shard, Together, WitnessTask, Work, tasks_in
from fimo.orchestrator.store import NotFound
from fimo.orchestrator.sweep import estimates, keys, parts
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.device import deterministic, device_name, prepare_environment


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
    block, warned = estimate_block(sweep, resolved, device, task)
    return receipt(sweep.store.create(key, estimates.encode_block(block)[0]), warned)
