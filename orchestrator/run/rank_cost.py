"""What ``fimo rank`` would cost, before anything is run: every estimator of the spec over all n, and the verification.

From the estimators' own counts and operations timed on this machine (``fimo.estimators.rates``). Writes nothing.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from fimo import estimators
from fimo.estimators.rates import Rates
from fimo.orchestrator.resolve.resolved import Resolved
from fimo.workers.device import deterministic, pick_device


def rank_cost(resolved: Resolved, evals: int, top: int) -> dict[str, Any]:
    """Device-hours of a ranking of all n training examples for ``evals`` evaluation examples.

    Returns:
        ranking: {estimator: device-hours}; verify_cells: cells at most, verify_hours; device, train, evals.

    Raises:
        FimoError: the workload cannot be trained further.
    """
    manifest, resources = resolved.manifest, resolved.spec.resources
    device = pick_device(resources.gpus)
    torch.set_num_threads(max(1, int(resources.cpus)))
    hours: dict[str, float] = {}
    with deterministic(device):
        start = resolved.start(device)
        problem = estimators.Problem(
            model=start.model,
            train=start.train,
            evals=start.examples.first(min(evals, len(start.examples))),
            removals=[(index,) for index in range(manifest.train)],
            further_training=resolved.spec.further_training.settings(),
            at=(manifest.steps[-1],),
            start=start,
        )
        rates = Rates(problem)
        for name, params in manifest.estimators:
            [named] = estimators.parse({"name": name, **json.loads(params)})
            own = problem.with_seeds(named.runs(tuple(resolved.spec.seeds), resolved.spec.seeds.after))
            if named.refuses(own) is None:
                hours[f"{name} {params}"] = rates.seconds(named.work(own)) / 3600
        # Every example of either top is another one, at worst.
        wanted = min(manifest.train, 2 * top * evals)
        cells = wanted * resolved.spec.seeds.count
        verify = cells * manifest.steps[-1] * rates.step / 3600
    return {
        "device": device.type,
        "train": manifest.train,
        "evals": evals,
        "ranking": hours,
        "verify_cells": cells,
        "verify_hours": verify,
    }
