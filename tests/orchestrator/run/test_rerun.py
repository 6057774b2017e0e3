"""A cell is trained again in the stacks of its part."""

from __future__ import annotations

from fimo.orchestrator.run import rerun


def test_stacks_are_those_of_the_part() -> None:
    for removals in range(1, 12):
        for replicas in range(1, 14):
            cells = list(range(-1, removals))
            stacks = [cells[i : i + replicas] for i in range(0, len(cells), replicas)]
            for row in range(removals):
                rows = rerun._stack_mates(row, removals, replicas)
                again = [-1, *rows]
                made = [again[i : i + replicas] for i in range(0, len(again), replicas)]
                mine = next(s for s in stacks if row in s)
                assert made == ([mine] if -1 in mine else [stacks[0], mine])
