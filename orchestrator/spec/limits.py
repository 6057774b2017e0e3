"""What a spec, or a sweep in a store, may ask for: far above real work, and little enough to be told at once.

A sweep is planned, listed and reduced in one process, by lists of its cells. These bounds keep that to seconds and a
few gigabytes, whoever wrote the spec.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fimo.workers.errors import UsageError
from fimo.workers.settings import FurtherTraining

MOST_CELLS = 20_000_000
"""Removals × seeds: each of 67,000 sentences over 300 seeds."""
MOST_SHARDS = 1_000_000
"""Parts of a sweep: a store lists a thousand a second."""
MOST_INDICES = 50_000_000
"""Training indices in all removals: a thousand groups of half of CIFAR-10."""
MOST_LISTED = 2**29
"""Bytes of a file of removals."""
MOST_EVALS = 10_000_000
MOST_RECORDED = 100_000
"""Recorded steps."""
MOST_NUMBERS = 2**31 - 1
"""Deltas in one part: its offsets are 32 bits wide, and it is held in memory (16 GiB)."""
FEWEST = 8
"""Removals in a part whose number is left to fimo, at least, but for parts that would be too large."""
DEEPEST = 64
"""Nesting of what a spec holds."""


def check_depth(value: Any, name: str) -> None:
    """Refuse what is nested deeper than anything that means something; raises UsageError."""
    level = [value]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for one in level:
            inner += one.values() if isinstance(one, dict) else one if isinstance(one, list | tuple) else ()
        if not inner:
            return
        level = inner
    raise UsageError(f"{name} is nested too deeply")


def check_recorded(n: int, settings: FurtherTraining) -> None:
    """Refuse more recorded steps than can be kept, before any list of them is made; raises UsageError."""
    per_epoch, every = -(-n // settings.batch_size), settings.evaluate
    last = settings.steps if settings.steps is not None else (settings.epochs or 0) * per_epoch
    if every.every_epochs is not None:
        count = last // (per_epoch * every.every_epochs)
    elif every.every_steps is not None:
        count = last // every.every_steps
    else:
        count = len(every.at_steps or ())
    if count > MOST_RECORDED:
        raise UsageError(
            f"further_training.evaluate records {count:,} of {last:,} steps; at most {MOST_RECORDED:,} can be: "
            "evaluate less often"
        )


def check_removals(sizes: Sequence[int]) -> None:
    """Refuse removals of more indices in all than can be held; raises UsageError."""
    total = sum(sizes)
    if total > MOST_INDICES:
        raise UsageError(f"removals name {total:,} training examples in all, at most {MOST_INDICES:,} can be")


def check_size(removals: int, seeds: int, shard: int | None, evals: int, recorded: int) -> None:
    """Refuse a sweep that cannot be planned, or whose parts cannot be held.

    Args:
        shard: removals in one part, None = as many as fit; ``recorded``: steps.

    Raises:
        UsageError: one line that says which number is too large.
    """
    together = min(shard or 1, removals)
    shards = seeds * -(-removals // (shard or FEWEST))
    if removals * seeds > MOST_CELLS:
        raise UsageError(
            f"{removals:,} removals × {seeds:,} seeds are {removals * seeds:,} cells, at most {MOST_CELLS:,} can be: "
            "ask for fewer seeds or removals, or make several sweeps"
        )
    if shards > MOST_SHARDS:
        raise UsageError(
            f"the sweep has {shards:,} shards, at most {MOST_SHARDS:,} can be: ask for fewer seeds, or for a larger "
            "resources.shard"
        )
    if evals > MOST_EVALS:
        raise UsageError(f"{evals:,} evaluation examples, at most {MOST_EVALS:,} can be: set evals")
    numbers = (together + 2) * recorded * evals
    if numbers > MOST_NUMBERS:
        raise UsageError(
            f"a part would hold {numbers:,} numbers ({together:,} removals × {recorded:,} recorded steps × "
            f"{evals:,} evaluation examples), at most {MOST_NUMBERS:,} can be: evaluate less often, set evals, or a "
            "smaller resources.shard"
        )
