"""When g is evaluated: arithmetic on the numbers of examples and steps, which needs no torch."""

from __future__ import annotations

from fimo.workers.settings import FurtherTraining

Removal = tuple[int, ...]
"""Training indices left out; empty = the baseline."""

BASELINE: Removal = ()


def size_of(n: int, removal: Removal, settings: FurtherTraining) -> int:
    """How many examples one epoch of the cell has: fewer than ``n`` in drop mode alone."""
    return n - len(removal) if settings.removal_mode == "drop" else n


def epoch_steps(n: int, removal: Removal, settings: FurtherTraining) -> int:
    """Optimizer steps in one epoch of the cell (the ragged last batch counts)."""
    return -(-size_of(n, removal, settings) // settings.batch_size)


def amounts(n: int, removal: Removal, settings: FurtherTraining) -> list[tuple[int, int]]:
    """When g is evaluated: pairs (the cell's own step, the step it is recorded under), ascending.

    The two differ only in drop mode, for an evaluation by epochs, if leaving the removal out shortens the epoch by a
    whole batch. The cell is then evaluated at the end of *its* epoch, as the paper does, and recorded under the
    baseline's step of that epoch.
    """
    base, own = epoch_steps(n, BASELINE, settings), epoch_steps(n, removal, settings)
    every = settings.evaluate
    last = settings.steps if settings.steps is not None else (settings.epochs or 0) * base
    if every.every_epochs is not None:
        pairs = [(e * own, e * base) for e in range(every.every_epochs, last // base + 1, every.every_epochs)]
        whole_epochs = settings.epochs is not None
        pairs.append(((settings.epochs or 0) * own, last) if whole_epochs else (last, last))
    elif every.every_steps is not None:
        pairs = [(s, s) for s in range(every.every_steps, last + 1, every.every_steps)] + [(last, last)]
    else:
        pairs = [(s, s) for s in every.at_steps or () if s <= last] + [(last, last)]
    return sorted({step: (own_step, step) for own_step, step in pairs}.values())


def steps_recorded(n: int, settings: FurtherTraining) -> list[int]:
    """The steps under which results are recorded, ascending; the same for every cell."""
    return [step for _, step in amounts(n, BASELINE, settings)]
