"""How many replicas to train together: by measurement, one at a time included."""

from __future__ import annotations

import time

import torch

from workers.batches import BASELINE, Removal
from workers.further_training import Problem, further_train
from workers.replay import AFTER
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
    device = problem.model.device
    # On one thread CPU time is told apart from that of the machine's other processes.
    read = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return read()

    # Steps are timed as a long run takes them: replayed, where the stack's steps are.
    first = AFTER + 1 if problem.graphs is not None and len(lanes) > 1 else 1
    further_train(problem, lanes, 0, last=first)
    best = float("inf")
    for _ in range(3):
        started = clock()
        further_train(problem, lanes, 0, last=first)
        short = clock() - started
        started = clock()
        further_train(problem, lanes, 0, last=first + steps)
        best = min(best, clock() - started - short)
    return max(best, 1e-9) / steps / len(lanes)
