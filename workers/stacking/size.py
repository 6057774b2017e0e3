"""How many replicas to train together: by measurement, one at a time included."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch

from fimo.workers.amounts import BASELINE, Removal
from fimo.workers.device import clock, forget_peak, is_gpu, peak_reserved, room
from fimo.workers.errors import FimoError
from fimo.workers.functional import FunctionalModel, Tensors
from fimo.workers.further_training import further_train
from fimo.workers.shard import out_of_memory, release
from fimo.workers.start import Start

CANDIDATES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
LARGE = (192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Sizes that a GPU is tried with besides."""
SHARE = 0.9
"""Of a GPU's memory that may be asked for: a little is lost between the pieces."""


@dataclass(frozen=True)
class Stacks:
    """How cells are trained together.

    Attributes:
        replicas: the stack size.
        abreast: each replica by itself, on several streams of a GPU (``Engine.abreast``).
        seconds: per replica and step of each size that was tried; ``by_streams``: of each that was tried abreast.
    """

    replicas: int
    abreast: bool = False
    seconds: dict[int, float] = field(default_factory=dict)
    by_streams: dict[int, float] = field(default_factory=dict)


def measure_stacks(start: Start, cells: int, each: int | None = None) -> Stacks:
    """The stack size as ``measure_stack_size`` has it and, of a model with convolutions on a GPU, the way.

    Replicas abreast are worth it in a recorded step alone: their kernels are too many to be launched one by one.
    """
    size, seconds = measure_stack_size(start, cells, each)
    abreast = start.using(replace(start.engine, abreast=True))
    if start.captures is None or not abreast.abreast or not _convolves(start.model):
        return Stacks(size, False, seconds)
    other, by_streams = measure_stack_size(abreast, cells, each)
    faster = by_streams[other] < seconds[size]
    return Stacks(other if faster else size, faster, seconds, by_streams)


def _convolves(model: FunctionalModel) -> bool:
    """Whether a model may have convolutions: a weight of three or more dimensions."""
    return any(p.dim() >= 3 for p in model.params.values())


def measure_stack_size(
    start: Start, cells: int, each: int | None = None, budget_s: float = 20.0
) -> tuple[int, dict[int, float]]:
    """The stack size with the fewest seconds per replica and step.

    Tries sizes upwards, over a few steps each. Stops at a size that does not fit in memory, that vmap refuses, or that
    is half as fast as the best, or when the budget of seconds is spent. On a GPU the memory that the sizes so far took
    says which will fit, and the largest that does is tried in place of one that does not.

    Args:
        cells: the most that a shard, or the shards of a task, could use.
        each: cells of one shard, of a task of several: from one to the next the seed is another.

    Returns:
        (stack size, seconds per replica and step of each size tried).
    """
    n, seconds = len(start.train), {}
    removal: Removal = (0,) if n > 1 else BASELINE
    started, device = time.monotonic(), start.model.device
    most, bytes_of = cells if start.engine.stack else 1, dict[int, int]()
    for candidate in (*CANDIDATES, *LARGE) if is_gpu(device) else CANDIDATES:
        # A GPU takes all cells at once if it can: a stack of the few that are left over costs it as much.
        size = min(candidate, most_that_fit(bytes_of, room(device)), most) if is_gpu(device) else candidate
        if size > most or size in seconds:
            break
        lanes = [removal if place % (each or cells) else BASELINE for place in range(size)]
        seeds = [place // (each or cells) for place in range(size)]
        try:
            if is_gpu(device):
                # What the last size left would count as this one's.
                release()
            forget_peak(device)
            seconds[size] = time_stack(start, lanes, seeds=seeds)
        except FimoError:
            raise
        except Exception as error:
            if size == 1 or not (out_of_memory(error) or size == 2):
                raise
            break
        bytes_of[size] = peak_reserved(device)
        if seconds[size] > 2 * min(seconds.values()) or time.monotonic() - started > budget_s:
            break
    return min(seconds, key=lambda s: seconds[s]), seconds


def most_that_fit(bytes_of: Mapping[int, int], memory: int) -> int:
    """The most replicas that fit: peak bytes grow along the line through the two largest sizes that were tried.

    Args:
        bytes_of: peak bytes by stack size; without two of them everything fits.
        memory: bytes that there are; 0 = not known.
    """
    if len(bytes_of) < 2 or not memory:
        return max(LARGE)
    (few, less), (many, more) = sorted(bytes_of.items())[-2:]
    each = max(1.0, (more - less) / (many - few))
    return max(many, many + int((SHARE * memory - more) // each))


def time_stack(start: Start, lanes: list[Removal], steps: int = 9, seeds: Sequence[int] | None = None) -> float:
    """Seconds per replica and step: the median step of a run, the better of two runs, the first steps apart."""
    device = start.model.device
    read = clock(device)
    # Time steps as a long run takes them: replayed, if the stack's steps are.
    first = start.first_steps

    def run() -> float:
        times: list[float] = []

        def note(_step: int, _params: Tensors) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(read())

        further_train(start, lanes, seeds or 0, watch=note, last=first + steps)
        taken = [after - before for before, after in pairwise(times)][first - 1 :]
        # Time a run that is shorter than that from its first step on.
        return statistics.median(taken or [after - before for before, after in pairwise(times)] or [0.0])

    return max(min(run(), run()), 1e-9) / len(lanes)
