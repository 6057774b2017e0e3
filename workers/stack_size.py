"""How many replicas to train together: by measurement, one at a time included."""

from __future__ import annotations

import time

import torch

from workers.batches import BASELINE, Removal
from workers.further_training import Problem, further_train
from workers.shard import out_of_memory

CANDIDATES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def measure_stack_size(problem: Problem, cells: int, budget_s: float = 20.0) -> tuple[int, dict[int, float]]:
    """The stack size with the fewest seconds per replica and step.

    Sizes are tried upwards and timed over a few steps, the fastest of three counting; a size that does not fit in
    memory, or that the model cannot be vmapped at, ends the search, as does a budget of seconds or a size half as
    fast as the best.

    Args:
        cells: the most that a shard could use.

    Returns:
        (stack size, seconds per replica and step of each size tried).
    """
    n, seconds = len(problem.train), {}
    removal: Removal = (0,) if n > 1 else BASELINE
    started = time.monotonic()
    for size in [c for c in CANDIDATES if c <= cells] or [1]:
        lanes = [BASELINE, *[removal] * (size - 1)]
        try:
            seconds[size] = _time(problem, lanes)
        except RuntimeError as error:
            if size == 1 or not (out_of_memory(error) or size == 2):
                raise
            break
        if seconds[size] > 2 * min(seconds.values()) or time.monotonic() - started > budget_s:
            break
    return min(seconds, key=lambda s: seconds[s]), seconds


def _time(problem: Problem, lanes: list[Removal], steps: int = 4) -> float:
    """Seconds per replica and step: the difference of a long and a short run, so that set-up does not count."""
    further_train(problem, lanes, 0, last=1)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        further_train(problem, lanes, 0, last=1)
        short = time.perf_counter() - started
        started = time.perf_counter()
        further_train(problem, lanes, 0, last=1 + steps)
        if problem.model.device.type == "cuda":
            torch.cuda.synchronize(problem.model.device)
        best = min(best, time.perf_counter() - started - short)
    return max(best, 1e-9) / steps / len(lanes)
