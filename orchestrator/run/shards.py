"""A worker's shards, from their removals to committed parts: one by itself, or several in the same stacks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fimo.orchestrator.resolve.resolved import Resolved
from fimo.orchestrator.run.provenance import peak_host_bytes, provenance
from fimo.orchestrator.run.proving import Proven
from fimo.orchestrator.run.results import ApartError, ConflictError
from fimo.orchestrator.run.work import Shard
from fimo.orchestrator.store import NotFound
from fimo.orchestrator.sweep import keys, parts
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.device import clock
from fimo.workers.joined import run_shards
from fimo.workers.shard import ShardResult


@dataclass(frozen=True)
class Committed:
    """A shard whose part is in the store.

    Attributes:
        written: by this process, rather than met there; ``diverged``: how many of its runs are not finite.
    """

    shard: Shard
    key: str
    written: bool
    diverged: int


def met(sweep: Sweep, manifest: Manifest, shard: Shard) -> Committed | None:
    """A shard whose part is there already, None if it is not; no run of one that does not verify has diverged.

    Such a part is the reduction's to set aside, after which the shard is owed again.
    """
    key = keys.part(sweep.name, manifest.digest, shard.seed, shard.removals)
    try:
        diverged = len({row for row, _ in sweep.read_part(key, manifest).diverged})
    except NotFound:
        return None
    except parts.BadPartError:
        diverged = 0
    return Committed(shard, key, False, diverged)


def train(
    sweep: Sweep,
    resolved: Resolved,
    engine: Proven,
    device: torch.device,
    flags: Mapping[str, object],
    shards: Sequence[Shard],
    owed: Collection[Shard],
) -> Iterator[Committed]:
    """Train shards in as few stacks as may be, and commit what each stack has come to before the next begins.

    Args:
        flags: those of ``fimo.workers.device.deterministic``, in which this runs.
        owed: those that are committed; the others are trained where they share a stack with these.

    Raises:
        ApartError: they are several, and no two can be trained in one stack.
        ConflictError: other rows are committed under a shard's key.
    """
    if len(shards) > 1 and not engine.start.joins:
        raise ApartError("no two seeds can be trained in one stack here: from now on one by one")
    read, graphs = clock(device), engine.start.graphs

    def now() -> float:
        # Tracing is done once a process, whatever it trains.
        return read() - (0.0 if graphs is None else graphs.seconds)

    began = now()
    asked = [([r.indices for r in shard.removals], shard.seed) for shard in shards]
    wanted = [place for place, shard in enumerate(shards) if shard in owed]
    for places, results in run_shards(engine.start, asked, engine.replicas, wanted):
        some = [shards[place] for place in places]
        about = {
            **provenance(device, resolved, flags),
            "replicas_at_start": engine.replicas,
            "engine": dict(engine.record),
            "device_seconds": (now() - began) / len(results),
        }
        if len(some) > 1:
            about["together"] = [[shard.seed, keys.set_hash(shard.removals)] for shard in some]
        for shard, result in zip(some, results, strict=True):
            if shard in owed:
                yield _commit(sweep, resolved.manifest, shard, result, about)
        began = now()


def _commit(sweep: Sweep, manifest: Manifest, shard: Shard, result: ShardResult, about: Mapping[str, Any]) -> Committed:
    key = keys.part(sweep.name, manifest.digest, shard.seed, shard.removals)
    own = {**about, "replicas": result.replicas, "peak_bytes": result.peak_bytes or peak_host_bytes()}
    data, rows = parts.encode_part(result, shard.removals, manifest.digest, own)
    written = sweep.store.create(key, data)
    if not written:
        there = sweep.read_part(key, manifest)
        # Trained with others beside it, it rounds otherwise, and stands: drivers may see other parts of a block.
        if there.rows != rows and there.provenance.get("together") == own.get("together"):
            raise ConflictError(
                f"part {key} holds other rows than this run computed (another device, threads or replicas?); the "
                "committed part stands"
            )
    return Committed(shard, key, written, int((~result.deltas.isfinite().all(dim=2)).any(dim=1).sum()))
