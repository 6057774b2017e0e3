"""Sweeps whose parts and estimates are made up: all that `reduce.py` and `scale.py` need without training anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fimo import estimators
from fimo.orchestrator.run.blocks import value_digest
from fimo.orchestrator.spec.canonical import canonical
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.spec.spec import parse
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.estimates import EstimateBlock, encode_block
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.parts import encode_part
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.shard import ShardResult

PROVENANCE = {"device": "made", "device_seconds": 1.0, "peak_bytes": 0}


def manifest(
    seeds: int, removals: int, steps: int, evals: int, count: int = 0, shard: int = 100, name: str = "made"
) -> Manifest:
    """Of single removals, with ``count`` estimators."""
    entries: list[Any] = [{"name": "cg", "damping": 0.1 * (i + 1)} for i in range(count)]
    spec = parse(
        {
            "name": name,
            "workload": "concrete",
            "removals": {"indices": list(range(removals))},
            "seeds": seeds,
            "further_training": {
                "optimizer": {"name": "sgd", "lr": 0.1},
                "batch_size": 10,
                "steps": steps,
                "evaluate": {"every_steps": 1},
                "removal_mode": "reweight",
            },
            "estimators": entries,
            "resources": {"witnesses": 0, "proof": False, "shard": shard},
        }
    )
    return Manifest(
        spec=spec,
        beside=".",
        source="0" * 64,
        digest="1" * 64,
        estimate_digest="2" * 64,
        train=removals,
        evals=evals,
        scalars=1000,
        steps=tuple(range(1, steps + 1)),
        removals=tuple(NamedRemoval(i, str(i), (i,)) for i in range(removals)),
        estimators=tuple(_named(entry) for entry in entries),
    )


def _named(entry: dict[str, Any]) -> tuple[str, str]:
    [one] = estimators.parse(entry)
    return one.name, canonical(one.params())


def truth(of: Manifest) -> np.ndarray[Any, Any]:
    """Effects that every seed has in common, float64 (R, T, m)."""
    shape = len(of.removals), len(of.steps), of.evals
    return np.random.default_rng(7).normal(size=shape) * 1e-3


def part(of: Manifest, seed: int, removals: Sequence[NamedRemoval], effects: np.ndarray[Any, Any]) -> tuple[str, bytes]:
    """A part's key and bytes; its deltas are the common effects and as much noise."""
    random = np.random.default_rng([seed, removals[0].number])
    deltas = random.normal(size=(len(removals) + 2, *effects.shape[1:])) * 1e-3
    deltas[:-2] += effects[[r.number for r in removals]] + deltas[-2]
    deltas[-1] = deltas[-2] + 1e-9
    return encoded(of, seed, removals, deltas, np.ones(deltas.shape[:2]))


def encoded(
    of: Manifest,
    seed: int,
    removals: Sequence[NamedRemoval],
    deltas: np.ndarray[Any, Any],
    distances: np.ndarray[Any, Any],
) -> tuple[str, bytes]:
    """The key and bytes of a part with these deltas (R + 2, T, m) and distances (R + 2, T)."""
    result = ShardResult(
        seed=seed,
        steps=of.steps,
        deltas=torch.from_numpy(deltas),
        distances=torch.from_numpy(distances),
        replicas=1,
        seconds=1.0,
        peak_bytes=0,
        scale=1.0,
        at_final=torch.ones(of.evals, dtype=torch.float64),
    )
    data, _ = encode_part(result, removals, of.digest, PROVENANCE)
    return keys.part(of.spec.name, of.digest, seed, removals), data


def shards(of: Manifest) -> list[tuple[NamedRemoval, ...]]:
    """The removals of each shard of a seed."""
    size = int(of.spec.resources.shard)
    return [of.removals[first : first + size] for first in range(0, len(of.removals), size)]


def write_estimates(sweep: Sweep, of: Manifest, effects: np.ndarray[Any, Any]) -> None:
    """A block for every estimator: every other one has values by step."""
    random = np.random.default_rng(3)
    for number, (name, params) in enumerate(of.estimators):
        by_step = number % 2 == 1
        values = np.moveaxis(effects, 1, 0) if by_step else effects[:, -1]
        values = values + random.normal(size=values.shape) * 1e-3
        digest, steps = value_digest(of, name, params), of.steps if by_step else None
        block = EstimateBlock(digest, name, params, of.removals, 0, steps, values, {**PROVENANCE, "notes": {}})
        prefix = keys.estimates(sweep.name, digest, name, params)
        sweep.store.put(keys.block(prefix, of.removals, 0, of.evals), encode_block(block)[0])


def write_sweep(sweep: Sweep, of: Manifest) -> int:
    """Everything of a sweep; returns the bytes of its parts' numbers."""
    effects = truth(of)
    sweep.write_manifest(of)
    for removals in shards(of):
        sweep.write_set(of.digest, removals)
    for seed in of.spec.seeds:
        for removals in shards(of):
            sweep.store.put(*part(of, seed, removals, effects))
    write_estimates(sweep, of, effects)
    return len(list(of.spec.seeds)) * (len(of.removals) + 2 * len(shards(of))) * effects[0].nbytes


def as_json(values: Any) -> str:
    return json.dumps(values, indent=1)
