"""What a worker process keeps from task to task: the sweep's model and data, its device, and the proven engine."""

from __future__ import annotations

import dataclasses
import platform

import torch

from fimo.orchestrator.resolve.resolved import Resolved, resolve_like
from fimo.orchestrator.run.proving import Proven, proven
from fimo.orchestrator.run.results import UnableError
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.amounts import Removal
from fimo.workers.device import pick_device
from fimo.workers.errors import FimoError, UsageError, WorkloadError

# One sweep at a time in a process: the next one's model and data replace this one's.
_loaded: dict[tuple[str, ...], Resolved] = {}
_engines: dict[tuple[object, ...], Proven] = {}
_engines_of: dict[str, tuple[NamedRemoval, ...]] = {}


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


def look_again(sweep: Sweep, manifest: Manifest) -> None:
    """Before a run in a process that may have run others: forget an engine that this sweep's store does not vouch for.

    Equal digests may lie in several stores, a store may have lost its verdict, and a verdict is on what the removals
    were (sizes of shards, groups).
    """
    of, asked = {sweep.uri: manifest.removals}, manifest.spec.resources
    if asked.proof:
        vouched = of == _engines_of and all(any(sweep.store.list(str(e.record["proof"]))) for e in _engines.values())
    else:
        # A measured stack size is the store's too.
        vouched = asked.replicas != "auto"
    if not vouched:
        _engines.clear()
    _engines_of.clear()
    _engines_of.update(of)


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
    # Of a whole one too: the process may have had a share of it for another sweep.
    torch.cuda.set_per_process_memory_fraction(min(1.0, gpus), device)
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
