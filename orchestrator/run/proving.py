"""The engine that a sweep may use on a device: proven once, the verdict kept in the store and named in every part.

The first worker of a device type proves (``fimo.workers.proof``), and proves again after a change of software, threads
or of what is to be proven (stack size, sizes of shards, groups). The verdict holds for all workers and all resumes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from fimo.orchestrator.resolve.resolved import Resolved
from fimo.orchestrator.run.plan import seeds_together, size_of_shards
from fimo.orchestrator.run.provenance import versions
from fimo.orchestrator.spec.canonical import canonical, digest
from fimo.orchestrator.store import MemoryStore, NotFound
from fimo.orchestrator.store.base import is_key
from fimo.orchestrator.sweep import keys, records
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.amounts import Removal
from fimo.workers.device import device_name
from fimo.workers.errors import StoreError, UsageError
from fimo.workers.joined import joint_sizes
from fimo.workers.proof import UnprovenError, prove
from fimo.workers.stacking.products import multiplies
from fimo.workers.stacking.size import Stacks, measure_stacks
from fimo.workers.start import Engine, Start
from fimo.workers.trial import Case

SOFTWARE = ("fimo", "python", "torch", "numpy", "transformers", "peft")
"""Whose change makes a verdict out of date."""

ENGINE = [field.name for field in fields(Engine)]
"""What a verdict is about: one of an engine that had less is out of date."""


@dataclass(frozen=True)
class Proven:
    """What a worker trains with.

    Attributes:
        start: the sweep's, with the engine that was proven.
        replicas: cells trained together.
        record: what a part's provenance says of it.
        lines: what a person should know, from the worker that made the proof alone.
    """

    start: Start
    replicas: int
    record: Mapping[str, Any]
    lines: tuple[str, ...] = ()


def proven(sweep: Sweep, resolved: Resolved, start: Start, removals: tuple[Removal, ...]) -> Proven:
    """The engine for this device: from the store, or proven now.

    Args:
        removals: of the task at hand, each once, if the sweep's own cannot be told from the store.

    Raises:
        UnprovenError: the engine does not give the definition's numbers, here or in an earlier proof.
    """
    manifest, device = resolved.manifest, device_name(start.model.device)
    every = _removals(sweep, manifest) or removals
    if not resolved.spec.resources.proof:
        stacks = _stacks(sweep, resolved, start, len(every))
        record = {"proof": "off", "path": "not proven", **({"abreast": True} if stacks.abreast else {})}
        return Proven(_by(start, stacks), stacks.replicas, record)
    shards = _shards(manifest, len(every))
    asked = resolved.spec.resources
    about: dict[str, Any] = {
        "software": {name: versions().get(name) for name in SOFTWARE},
        "threads": torch.get_num_threads(),
        "asked": [asked.replicas, asked.replay],
        "engine": ENGINE,
        "shards": shards,
        "groups": max(map(len, every)) > 1,
    }
    if (together := seeds_together(manifest, len(every))) > 1:
        about["together"] = together
    if (multiplier := multiplies(start.model.device)) != "torch":
        about["products"] = multiplier
    key = keys.proof(sweep.name, manifest.digest, device, digest(about)[:16])
    with contextlib.suppress(NotFound):
        return _taken(_verdict(sweep, key), key, start)
    verdict = _prove(sweep, resolved, start, every, shards)
    body = canonical({"device": device, "about": about, **verdict}).encode()
    # The first to have proven decides for everybody.
    if not sweep.store.create(key, body):
        return _taken(_verdict(sweep, key), key, start)
    taken = _taken(verdict, key, start)
    return replace(taken, lines=tuple(f"{line}: given up on {device}" for line in verdict["lines"]))


def engine_of_part(sweep: Sweep, manifest: Manifest, provenance: Mapping[str, Any]) -> Engine:
    """The engine that a part was trained with, by the verdict that it names; everything if it names none."""
    found = provenance.get("engine")
    about: Mapping[str, Any] = found if isinstance(found, dict) else {}
    everything = Engine(replay=manifest.spec.resources.replay, abreast=about.get("abreast") is True)
    key = about.get("proof")
    if not isinstance(key, str) or not key.startswith(keys.proof(sweep.name, manifest.digest)) or not is_key(key):
        return everything
    try:
        verdict = records.read(records.Verdict, sweep.store.get(key))
    except StoreError:
        return everything
    flags = {} if verdict is None else verdict[0].engine
    # An older verdict says nothing of what there was not yet.
    return Engine(**{name: flags.get(name, getattr(everything, name)) for name in ENGINE}) if flags else everything


def rehearsed(sweep: Sweep, resolved: Resolved, start: Start) -> tuple[Proven, float]:
    """The engine as the sweep's first worker would prove it, and the seconds that it takes; nothing is written.

    Args:
        sweep: looked at alone: what was measured there counts, and a verdict that is there costs no seconds.

    Raises:
        UnprovenError: the engine does not give the definition's numbers.
    """
    manifest, began = resolved.manifest, time.perf_counter()
    aside = Sweep(MemoryStore(), sweep.name)
    aside.write_manifest(manifest)
    # A verdict, or a measured stack size, that the store has already is not made again.
    known = [entry.key for entry in sweep.store.list(keys.proof(sweep.name, manifest.digest))]
    together = seeds_together(manifest, len(manifest.removals))
    size = keys.replicas(sweep.name, manifest.digest, device_name(start.model.device), together)
    bad = sweep.bad_records(manifest.digest)
    for key in (*known, size):
        with contextlib.suppress(NotFound):
            if key not in bad:
                aside.store.put(key, sweep.store.get(key))
    engine = proven(aside, resolved, start, tuple(r.indices for r in manifest.removals))
    return engine, time.perf_counter() - began


def _prove(
    sweep: Sweep, resolved: Resolved, start: Start, removals: tuple[Removal, ...], shards: list[int]
) -> dict[str, Any]:
    manifest = resolved.manifest
    stacks, together = _stacks(sweep, resolved, start, len(removals)), seeds_together(manifest, len(removals))
    replicas, start = stacks.replicas, _by(start, stacks)
    case = Case(
        workload=resolved.workload,
        state=resolved.state,
        settings=start.settings,
        evals=resolved.manifest.evals,
        device=start.model.device,
        removals=removals,
        seed=resolved.spec.seeds.first,
        replicas=replicas,
        shards=shards,
        joint=joint_sizes(start, shards, together, replicas),
    )
    try:
        verdict = prove(case, start)
    except UnprovenError as error:
        return {"refused": str(error)}
    return {**verdict.json(), "replicas": replicas if verdict.engine.stack else 1}


def _verdict(sweep: Sweep, key: str) -> dict[str, Any]:
    found = records.read(records.Verdict, sweep.store.get(key))
    if found is None or (found[0].refused is None and not found[0].engine.keys() >= set(ENGINE)):
        raise StoreError(
            f"{sweep.store.uri}/{key} is no verdict on the engine: remove it, and the engine is proven anew"
        )
    return found[1]


def _taken(verdict: Mapping[str, Any], key: str, start: Start) -> Proven:
    if "refused" in verdict:
        raise UnprovenError(str(verdict["refused"]))
    engine = Engine(**{name: bool(verdict["engine"][name]) for name in ENGINE})
    record = {"proof": key, "path": str(verdict["path"])}
    return Proven(start.using(engine), max(1, int(verdict["replicas"])), record)


def _removals(sweep: Sweep, manifest: Manifest) -> tuple[Removal, ...]:
    """The sweep's removals as index tuples; none if the store's manifest is another run's, or there is none."""
    try:
        stored = sweep.read_manifest()
    except UsageError:
        return ()
    return tuple(r.indices for r in stored.removals) if stored.digest == manifest.digest else ()


def _shards(manifest: Manifest, removals: int) -> list[int]:
    """The numbers of removals that a shard of the sweep has: most, and the last of a seed."""
    size = min(size_of_shards(manifest), removals)
    return sorted({size, removals % size or size})


def _by(start: Start, stacks: Stacks) -> Start:
    return start.using(replace(start.engine, abreast=stacks.abreast))


def _stacks(sweep: Sweep, resolved: Resolved, start: Start, removals: int) -> Stacks:
    """Cells trained together: as the spec says, or measured once per device type and kept in the store."""
    asked, manifest = resolved.spec.resources.replicas, resolved.manifest
    if asked != "auto":
        return Stacks(asked)
    together, each = seeds_together(manifest, removals), min(size_of_shards(manifest), removals) + 1
    key = keys.replicas(sweep.name, manifest.digest, device_name(start.model.device), together)
    for _ in range(2):
        with contextlib.suppress(NotFound):
            if (found := records.read(records.StackSize, sweep.store.get(key))) is not None:
                # It may have been measured where steps were recorded.
                return Stacks(found[0].replicas, found[0].abreast and start.engine.replay)
        # A shard's removals and its baseline are the most that can be trained together, or those of several shards.
        several = start.joins and together > 1
        cells = together * each if several else size_of_shards(manifest) + 1
        stacks = measure_stacks(start, cells, each if several else None)
        # The first to have measured decides for everybody.
        if sweep.store.create(key, canonical(_body(stacks)).encode()):
            return stacks
    return stacks


def _body(stacks: Stacks) -> dict[str, Any]:
    body: dict[str, Any] = {"replicas": stacks.replicas, "seconds_per_replica_step": _named(stacks.seconds)}
    if stacks.by_streams:
        body |= {"abreast": stacks.abreast, "seconds_by_streams": _named(stacks.by_streams)}
    return body


def _named(seconds: Mapping[int, float]) -> dict[str, float]:
    return {str(size): value for size, value in seconds.items()}
