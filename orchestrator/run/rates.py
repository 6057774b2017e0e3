"""Shards of sweeps that differ in their learning rate alone, trained in the same stacks and committed apart.

Each sweep's part is what its own task would have committed, to rounding. The engine is proven for the first of them:
what it is given does not depend on the rate.
"""

from __future__ import annotations

from collections.abc import Sequence

from fimo.orchestrator.run.owed import current_plan
from fimo.orchestrator.run.prepared import engine_of, pick, prepared
from fimo.orchestrator.run.provenance import peak_host_bytes, provenance
from fimo.orchestrator.run.work import Shard
from fimo.orchestrator.sweep import keys, parts
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.device import clock, deterministic, peak, prepare_environment
from fimo.workers.joined import run_rates
from fimo.workers.shard import out_of_memory


def train_rates(sweep: Sweep, manifests: Sequence[Manifest], final_model: bytes | None, gpu: int = 0) -> bool:
    """Train what all the manifests owe, shard by shard.

    Args:
        manifests: of one spec but for the learning rate; ``gpu`` as for ``run_task``.

    Returns:
        Whether it could be done: they owe the same, and memory is not short. What is left is left to their own tasks.
    """
    plans = [current_plan(of, sweep).shards for of in manifests]
    if any(plan != plans[0] for plan in plans):
        return False
    prepare_environment()
    first = manifests[0]
    resolved, device = prepared(first, final_model), pick(first, gpu)
    rates = [of.spec.further_training.optimizer.lr for of in manifests]
    for shard in plans[0]:
        with deterministic(device) as flags:
            engine = engine_of(sweep, resolved, device, tuple(r.indices for r in shard.removals))
            read = clock(device)
            began = read()
            try:
                results = run_rates(
                    engine.start, [r.indices for r in shard.removals], shard.seed, engine.replicas, rates
                )
            except Exception as error:
                if out_of_memory(error):
                    return False
                raise
            spent = (read() - began) / len(rates)
        about = {
            **provenance(device, resolved, flags),
            "replicas": engine.replicas,
            "engine": {**engine.record, "rates_together": len(rates)},
            "device_seconds": spent,
            "peak_bytes": peak(device) or peak_host_bytes(),
        }
        for of, result in zip(manifests, results, strict=True):
            data, _ = parts.encode_part(result, shard.removals, of.digest, about)
            # Whoever was first has trained the same cells.
            sweep.store.create(_key(sweep, of, shard), data)
    return True


def _key(sweep: Sweep, of: Manifest, shard: Shard) -> str:
    return keys.part(sweep.name, of.digest, shard.seed, shard.removals)
