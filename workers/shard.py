"""One shard: the cells of one seed with their baseline, trained together in stacks of a chosen size.

The stack size changes how fast a shard runs and nothing else: which cells it holds, their order and the rows
that result are fixed by the removals and the seed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.workers.amounts import BASELINE, Removal, amounts, steps_recorded
from fimo.workers.batches import first_difference
from fimo.workers.device import forget_peak, peak
from fimo.workers.errors import FimoError
from fimo.workers.further_training import Deltas, further_train
from fimo.workers.stacking.forking import Stack, stacks_of, trained
from fimo.workers.start import Start


@dataclass(frozen=True)
class ShardResult:
    """The deltas of a shard's cells.

    Attributes:
        seed: the shard's ξ.
        steps: the T recorded steps.
        deltas: float64 (C + 2, T, m): the C removals in the order given, then the baseline, then the second
            baseline of the noise floor. Not finite if a run diverged.
        distances: ‖Δθ_t‖, float64 (C + 2, T).
        replicas: the stack size used at the end (it halves when memory runs out).
        seconds: wall-clock seconds of training and evaluation.
        peak_bytes: peak device memory on CUDA, else 0.
        scale: the root mean square of g(z, θᶠ) over evaluation examples: what a delta is large or small beside.
        at_final: g(z, θᶠ), float64 (m,).
    """

    seed: int
    steps: tuple[int, ...]
    deltas: Tensor
    distances: Tensor
    replicas: int
    seconds: float
    peak_bytes: int
    scale: float = 0.0
    at_final: Tensor | None = None


def run_shard(
    start: Start,
    removals: Sequence[Removal],
    seed: int,
    replicas: int,
    progress: Callable[[int, int], None] | None = None,
    second: bool = True,
) -> ShardResult:
    """Train the removals, the baseline and a second baseline.

    The second baseline is trained in a stack of another size (alone, or as one of two if the others are trained alone):
    the same mathematics in another order of rounding. The difference bounds the noise floor from below;
    ``fimo.workers.witness`` measures it.

    Args:
        replicas: cells trained together.
        progress: called with (cells done, cells in all).
        second: False trains no second baseline; the first one's row stands in its place too.
    """
    started = time.monotonic()
    forget_peak(start.model.device)
    cells = [BASELINE, *removals]
    results: dict[int, tuple[Tensor, Tensor]] = {}

    def take(stack: Stack, result: Deltas) -> None:
        results.update(zip(stack.places, zip(result.deltas, result.distances, strict=True), strict=True))
        if progress is not None:
            progress(len(results), len(cells))

    replicas = in_stacks(start, cells, seed, replicas, take)
    baseline = Deltas(tuple(steps_recorded(len(start.train), start.settings)), *(r[None] for r in results[0]))
    floor = _floor(start, seed, replicas) if second else baseline
    # Removals first, then the baseline, then the second baseline.
    order = [*range(1, len(cells)), 0]
    deltas = torch.stack([*(results[place][0] for place in order), floor.deltas[0]])
    distances = torch.stack([*(results[place][1] for place in order), floor.distances[0]])
    copy_before_first_difference(start, removals, seed, deltas, distances)
    scale, seconds = float(start.at_final.square().mean().sqrt()), time.monotonic() - started
    taken = peak(start.model.device)
    return ShardResult(seed, floor.steps, deltas, distances, replicas, seconds, taken, scale, start.at_final)


def in_stacks(
    start: Start, cells: Sequence[Removal], seed: int, replicas: int, take: Callable[[Stack, Deltas], None]
) -> int:
    """Train the cells in stacks of at most ``replicas``; smaller ones if memory runs out, or ``vmap`` refuses.

    Args:
        take: is given each stack's results once, when they are there; the first baseline's come last.

    Returns:
        The stack size used at the end.
    """
    done: set[int] = set()
    replicas, fork = replicas if start.engine.stack else 1, start.engine.fork
    while len(done) < len(cells):
        stacks = stacks_of(start, cells, [place for place in range(len(cells)) if place not in done], seed, replicas)
        try:
            for stack, result in trained(start, stacks, seed, fork):
                done.update(stack.places)
                take(stack, result)
        except FimoError:
            raise
        except Exception as error:
            size, short = len(stacks[0].lanes), out_of_memory(error)
            if size == 1 and not (fork and len(stacks) > 1):
                raise
            if short and fork and len(stacks) > 1:
                # A stack that is forked is in memory beside the baseline's.
                fork = False
            else:
                # If memory is not short, vmap may have refused the model: one at a time tells that from a real error.
                fork, replicas = fork and size > 1, size // 2 if short else 1
            release()
    return replicas


def _floor(start: Start, seed: int, replicas: int) -> Deltas:
    alone = (replicas > 1 and not start.abreast) or not start.engine.stack
    stack = [BASELINE] if alone else [BASELINE, BASELINE]
    try:
        both: Deltas | None = further_train(start.by_vmap, stack, seed)
    except FimoError:
        raise
    except Exception:
        # Train it alone if the model cannot be stacked, or two replicas do not fit.
        if len(stack) == 1:
            raise
        both = None
    if both is None:
        release()
        both = further_train(start, [BASELINE], seed)
    return Deltas(both.steps, both.deltas[-1:], both.distances[-1:])


def copy_before_first_difference(
    start: Start, removals: Sequence[Removal], seed: int, deltas: Tensor, distances: Tensor
) -> None:
    """Make the effect exactly 0 while a cell has seen only the baseline's batches, whatever the stack rounded."""
    n, settings = len(start.train), start.settings
    baseline = len(removals)
    for cell, removal in enumerate(removals):
        first = first_difference(n, removal, settings, seed)
        for place, (own_step, step) in enumerate(amounts(n, removal, settings)):
            if own_step == step and (first is None or step < first):
                deltas[cell, place] = deltas[baseline, place]
                distances[cell, place] = distances[baseline, place]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on CUDA or on the CPU."""
    text = str(error)
    # The last is what CUDA's libraries say, which ask for some of their own.
    said = "not enough memory", "out of memory", "STATUS_ALLOC_FAILED"
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(words in text for words in said)


def release() -> None:
    """Give back memory that nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
