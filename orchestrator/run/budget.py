"""What an estimator of the default set may cost: nobody asked for it by name, so it must not dwarf the sweep."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from fimo import estimators
from fimo.estimators.counts import Work
from fimo.estimators.rates import Rates
from fimo.orchestrator.spec.spec import Spec
from fimo.workers.device import free

LEAST_S = 60.0
SHARE = 0.25
"""Of the device-seconds of the sweep's own cells, if that is more than ``LEAST_S``."""
FREE = 0.8
"""Of the free memory that an estimator may fill."""


def too_dear(
    named: estimators.Estimator, problem: estimators.Problem, tasks: int, spec: Spec, steps: int
) -> str | None:
    """Why an estimator is left out for its cost, in a line; None if it is within its budget.

    Args:
        problem: of one task; ``tasks``: how many like it there are.
        steps: optimizer steps of a cell.
    """
    work, rates = named.work(problem), Rates(problem)
    seconds, asked = tasks * rates.seconds(work), spec.resources.estimator_budget_s
    if asked != "auto":
        budget = asked
    else:
        cells = len(problem.removals) * len(tuple(spec.seeds))
        budget = max(LEAST_S, SHARE * cells * steps * spec.further_training.batch_size * rates.example)
    if seconds > budget:
        return (
            f"too dear: about {seconds:.2g} device-seconds, the budget is {budget:.2g}; name it in estimators, or "
            "raise resources.estimator_budget_s"
        )
    large = too_large(work, problem.model.device)
    return None if large is None else f"{large}; name it in estimators to try it all the same"


def too_large(work: Work, device: torch.device) -> str | None:
    """That some work does not fit in the memory that is free on a device now, in a line; None if it does."""
    there = _free_bytes(device)
    if work.bytes <= FREE * there:
        return None
    return f"too large: it holds about {work.bytes / 2**30:.1f} GiB, {there / 2**30:.1f} GiB are free here"


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(free(device))
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)
