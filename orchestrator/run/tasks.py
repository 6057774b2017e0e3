"""What runs in a worker process: one shard or one block of estimates, from a context to a committed object.

A task returns a receipt (key, counts, timings), never data: everything of value is in the store before it returns. Ray
is not imported here; the same functions run in process under test.
"""

from __future__ import annotations

import contextlib
import json
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from fimo.orchestrator.resolve.identity import canonical
from fimo.orchestrator.resolve.prepare import Prepared, prepare
from fimo.orchestrator.run import estimating
from fimo.orchestrator.run.estimating import estimate_identity
from fimo.orchestrator.run.plan import Shard
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.spec.spec import parse
from fimo.orchestrator.store import NotFound, Store
from fimo.orchestrator.sweep import estimates as estimate_parts
from fimo.orchestrator.sweep import parts
from fimo.workers.device import deterministic, device_name, pick_device, prepare_environment
from fimo.workers.errors import FimoError, WorkloadError
from fimo.workers.shard import run_shard
from fimo.workers.stacking.size import measure_stack_size
from fimo.workers.start import Start


class ConflictError(FimoError):
    """Another writer committed different rows under the same key."""


@dataclass(frozen=True)
class Context:
    """What every task of a run shares; small, and free of data and credentials.

    Attributes:
        spec: canonical JSON.
        beside: the folder in which the workload's module is looked for.
        digest, estimate_digest: what the worker's own must equal.
    """

    store: Store
    sweep: str
    spec: str
    beside: str
    digest: str
    estimate_digest: str

    @property
    def workload(self) -> str:
        """The spec's ``module:function``."""
        return str(json.loads(self.spec)["workload"])


@dataclass(frozen=True)
class EstimateTask:
    """One estimator's values for some removals and a block of evaluation examples."""

    estimator: str
    params: str
    removals: tuple[NamedRemoval, ...]
    first: int
    count: int


Task = Shard | EstimateTask


@dataclass(frozen=True)
class Receipt:
    """What a finished task says of itself.

    Attributes:
        key: the committed object; ``written``: by this task, rather than found there with the same rows.
        cells: cells in it (0 for estimates); ``diverged``: of these, runs that were not finite.
    """

    key: str
    written: bool
    cells: int
    diverged: int
    seconds: float
    device: str


def task_name(task: Task) -> str:
    """How a task is called in progress and errors."""
    if isinstance(task, Shard):
        return f"seed {task.seed}, {len(task.removals)} removals"
    return f"estimator {task.estimator} {task.params}"


def run_task(context: Context, final_model: bytes | None, task: Task, gpu: int = 0) -> Receipt:
    """Compute and commit one task.

    Args:
        final_model: the bytes of θᶠ's file; not looked at where the process is prepared already.
        gpu: which of the GPUs that torch sees is this task's.

    Raises:
        FimoError: in one line; ConflictError where different rows are already committed under the key.
    """
    prepare_environment()
    prepared = _prepared(context, final_model)
    device = _device(prepared.spec.resources.gpus, gpu)
    torch.set_num_threads(max(1, int(prepared.spec.resources.cpus)))
    if isinstance(task, Shard):
        return _shard(context, prepared, device, task)
    return _estimate(context, prepared, device, task)


# One sweep at a time in a process: the next one's model and data replace this one's.
_cache: dict[tuple[str, str], Prepared] = {}
_starts: dict[tuple[str, str], Start] = {}


def is_prepared(context: Context) -> bool:
    """Whether this process holds the sweep's model and data already."""
    return (context.digest, context.spec) in _cache


def _prepared(context: Context, final_model: bytes | None) -> Prepared:
    name = (context.digest, context.spec)
    if name not in _cache:
        _cache.clear()
        _starts.clear()
        # On a machine without the driver's folder the code is where Ray has put it: the working directory.
        beside = Path(context.beside) if Path(context.beside).is_dir() else Path.cwd()
        prepared = prepare(parse(json.loads(context.spec)), beside, final_model)
        if (prepared.digest, prepared.estimate_digest) != (context.digest, context.estimate_digest):
            raise WorkloadError(
                f"node {platform.node()} sees other code or data than the driver (another digest): "
                "make the workload deterministic and its files the same everywhere"
            )
        # torch loads its function transforms on first use: a second that no estimator should be charged with.
        torch.func.vmap(torch.func.grad(lambda x: x * x))(torch.ones(1))
        _cache[name] = prepared
    return _cache[name]


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


def _start(context: Context, prepared: Prepared, device: torch.device) -> Start:
    name = (context.digest, str(device))
    if name not in _starts:
        # A process that is given another GPU leaves none of its memory on the last one.
        _starts.clear()
        _starts[name] = prepared.start(device)
    return _starts[name]


def _shard(context: Context, prepared: Prepared, device: torch.device, task: Shard) -> Receipt:
    started = time.monotonic()
    key = parts.part_key(context.sweep, context.digest, task.seed, task.removals)
    # A task whose receipt was lost with its worker, or that another driver was quicker at, is not computed again.
    with contextlib.suppress(NotFound, parts.BadPartError):
        part = parts.decode_part(context.store.get(key), key)
        diverged = len({row for row, _ in part.diverged})
        return Receipt(key, False, len(task.removals), diverged, time.monotonic() - started, device_name(device))
    with deterministic(device) as flags:
        start = _start(context, prepared, device)
        replicas = _replicas(context, prepared, start, device)
        result = run_shard(start, [r.indices for r in task.removals], task.seed, replicas)
    provenance = {
        **_provenance(device, prepared, flags),
        "replicas": result.replicas,
        "device_seconds": time.monotonic() - started,
        "peak_bytes": result.peak_bytes or _peak_host_bytes(),
    }
    data, rows = parts.encode_part(result, task.removals, context.digest, provenance)
    written = context.store.create(key, data)
    if not written and parts.decode_part(context.store.get(key), key).rows != rows:
        raise ConflictError(
            f"part {key} holds other rows than this run computed (another device, threads or replicas?); "
            "the committed part stands"
        )
    diverged = int((~result.deltas.isfinite().all(dim=2)).any(dim=1).sum())
    return Receipt(key, written, len(task.removals), diverged, time.monotonic() - started, device_name(device))


def _replicas(context: Context, prepared: Prepared, start: Start, device: torch.device) -> int:
    """Cells trained together: as the spec says, or measured once per device type and kept in the store."""
    asked = prepared.spec.resources.replicas
    if asked != "auto":
        return asked
    key = replicas_key(context.sweep, context.digest, device_name(device))
    for _ in range(2):
        with contextlib.suppress(NotFound, ValueError, KeyError, TypeError):
            return max(1, int(json.loads(context.store.get(key))["replicas"]))
        size, seconds = measure_stack_size(start, parts_largest(prepared))
        body = {"replicas": size, "seconds_per_replica_step": {str(k): v for k, v in seconds.items()}}
        # The first to have measured decides for everybody.
        if context.store.create(key, canonical(body).encode()):
            return size
    return size


def replicas_key(sweep: str, result_digest: str, device: str) -> str:
    """Where the measured number of replicas for a device type (`fimo.workers.device.device_name`) is kept."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")[:80]
    return f"{sweep}/replicas/{result_digest[:32]}-{slug}.json"


def parts_largest(prepared: Prepared) -> int:
    """The most cells that a shard of this sweep can train together: its removals and a baseline."""
    shard = prepared.spec.resources.shard
    return 101 if shard == "auto" else shard + 1


def _estimate(context: Context, prepared: Prepared, device: torch.device, task: EstimateTask) -> Receipt:
    started = time.monotonic()
    digest = estimate_identity(context.digest, context.estimate_digest, prepared.spec, task.estimator, task.params)
    key = estimate_parts.key(context.sweep, digest, task.estimator, task.params, task.removals, task.first, task.count)
    with contextlib.suppress(NotFound, parts.BadPartError):
        estimate_parts.decode_block(context.store.get(key), key)
        return Receipt(key, False, 0, 0, time.monotonic() - started, device_name(device))
    _reset_peak(device)
    removals, span = [r.indices for r in task.removals], (task.first, task.count)
    with deterministic(device) as flags:
        estimate = estimating.estimate(prepared, device, task.estimator, task.params, removals, span)
    provenance = {
        **_provenance(device, prepared, flags),
        "notes": json.loads(json.dumps(dict(estimate.notes), default=str)),
        "device_seconds": time.monotonic() - started,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_host_bytes(),
    }
    part = estimate_parts.EstimateBlock(
        digest=digest,
        estimator=task.estimator,
        params=task.params,
        removals=task.removals,
        first=task.first,
        steps=estimate.steps,
        values=estimate.values.numpy(),
        provenance=provenance,
    )
    data, _ = estimate_parts.encode_block(part)
    written = context.store.create(key, data)
    return Receipt(key, written, 0, 0, time.monotonic() - started, device_name(device))


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_host_bytes() -> int:
    """The process's largest resident size so far, in bytes."""
    import resource  # not on every platform

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _provenance(device: torch.device, prepared: Prepared, flags: Mapping[str, object]) -> dict[str, Any]:
    return {
        "versions": versions(),
        "device": device_name(device),
        "host": platform.node(),
        "dtype": prepared.spec.further_training.precision,
        "threads": torch.get_num_threads(),
        "determinism": dict(flags),
        "removal_mode": prepared.spec.further_training.removal_mode,
    }


@lru_cache
def versions() -> dict[str, str]:
    """The versions that a part records of the software that made it."""
    found = {"python": platform.python_version()}
    for package in ("fimo", "torch", "numpy", "pyarrow", "ray", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
