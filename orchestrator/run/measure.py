"""What a sweep will cost, from a few timed steps of one stack on this machine. Writes nothing."""

from __future__ import annotations

import time
from typing import Any

import torch

from fimo.orchestrator.resolve.resolved import Resolved
from fimo.orchestrator.run.plan import Plan, size_of_shards
from fimo.workers.device import deterministic, pick_device
from fimo.workers.further_training import further_train
from fimo.workers.stacking.size import measure_stack_size


def measure(resolved: Resolved, plan: Plan) -> dict[str, Any]:
    """Time a stack over a few steps and an evaluation, and reckon what is missing of the sweep from it.

    Returns:
        replicas (trained together), seconds_per_step (of one replica), seconds_per_cell, device_hours (of the
        missing cells and their baselines), device.

    Raises:
        FimoError: the workload cannot be trained further.
    """
    manifest, resources = resolved.manifest, resolved.spec.resources
    device = pick_device(resources.gpus)
    torch.set_num_threads(max(1, int(resources.cpus)))
    with deterministic(device):
        start = resolved.start(device)
        cells = min(size_of_shards(manifest), len(manifest.removals)) + 1
        size, seconds = measure_stack_size(start, cells)
        if resources.replicas != "auto":
            size = min(resources.replicas, cells)
        lanes = [r.indices for r in manifest.removals[: size - 1]]
        started = time.perf_counter()
        further_train(start, [(), *lanes], 0, last=manifest.steps[0])
        first = time.perf_counter() - started
    per_step = seconds.get(size, min(seconds.values()))
    evaluation = max(0.0, first / (1 + len(lanes)) - per_step * manifest.steps[0])
    cell = per_step * manifest.steps[-1] + evaluation * len(manifest.steps)
    # Every shard also trains its baseline and the second baseline of the noise floor.
    total = cell * (plan.missing + 2 * len(plan.shards))
    return {
        "replicas": size,
        "seconds_per_step": per_step,
        "seconds_per_cell": cell,
        "device_hours": total / 3600,
        "device": device.type,
    }
