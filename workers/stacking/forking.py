"""The cells of a seed in stacks, each started where its cells first differ from the baseline.

In mask and drop mode a cell *is* its baseline until the first batch that differs. So a stack of such cells starts from
the state of the baseline's replica before that batch: the same numbers, bit for bit, as if it had been trained from θᶠ.
For that a replica must round alike wherever it is trained: which cells are trained together, and in what order, is the
same with and without forking, and only stacks as large as the baseline's are forked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fimo.workers.amounts import BASELINE, Removal, amounts
from fimo.workers.batches import first_difference
from fimo.workers.further_training import Deltas, Training
from fimo.workers.start import Start


@dataclass(frozen=True)
class Stack:
    """Cells that are trained together.

    Attributes:
        places: among all cells; ``lanes``: their removals.
        shared: steps that all of them have in common with the baseline.
    """

    places: tuple[int, ...]
    lanes: tuple[Removal, ...]
    shared: int


def stacks_of(start: Start, cells: Sequence[Removal], places: Sequence[int], seed: int, replicas: int) -> list[Stack]:
    """The cells at ``places`` in stacks of at most ``replicas``, those that differ from the baseline first, first.

    The baseline's stack comes first. A smaller stack comes next, where there is least to share.
    """
    shared = {place: _shared(start, cells[place], seed) for place in places}
    ordered = sorted(places, key=lambda place: (cells[place] != BASELINE, shared[place]))
    first, size = ordered[:replicas], min(replicas, len(ordered))
    rest = ordered[len(first) :]
    ragged = len(rest) % size if rest else 0
    groups = [first, rest[:ragged], *(rest[i : i + size] for i in range(ragged, len(rest), size))]
    return [
        Stack(
            tuple(group),
            tuple(cells[place] for place in group),
            min(shared[place] for place in group) if len(group) == len(first) else 0,
        )
        for group in groups
        if group
    ]


def trained(start: Start, stacks: Sequence[Stack], seed: int, fork: bool) -> Iterator[tuple[Stack, Deltas]]:
    """The stacks as they are done; with ``fork``, from the state of the first one's baseline.

    Results of a stack that is forked are NaN under the steps that it shares with the baseline.
    """
    baseline = Training(start, stacks[0].lanes, seed)
    for stack in stacks[1:]:
        if fork and stack.shared > 0 and may_fork(start, len(stack.lanes)) and stacks[0].lanes[0] == BASELINE:
            baseline.advance(stack.shared)
            training = Training(start, stack.lanes, seed, baseline.state_of(0))
        else:
            training = Training(start, stack.lanes, seed)
        training.advance()
        yield stack, training.result()
    baseline.advance()
    yield stacks[0], baseline.result()


def may_fork(start: Start, size: int) -> bool:
    """Whether a replica of a stack rounds alike whatever the others' batches are."""
    if start.settings.removal_mode == "reweight":
        return False
    if size == 1:
        return True
    if start.settings.removal_mode == "mask":
        # Replicas of one batch size are computed together, and others may have lost an example.
        return not start.forward.mixes
    # How batches are cut depends on the examples of all replicas.
    return start.trimming is None


def _shared(start: Start, removal: Removal, seed: int) -> int:
    """Steps of a cell that are its baseline's, and recorded as the baseline's."""
    n, settings = len(start.train), start.settings
    first = first_difference(n, removal, settings, seed)
    if first is None:
        return 0
    # Drop may end a cell's epoch before its baseline's: what is recorded then is recorded for itself.
    own = [step for step, recorded in amounts(n, removal, settings) if step != recorded]
    return min([first, *own]) - 1
