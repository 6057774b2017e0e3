"""Whole seeds in a few groups, of which one at a time is left out.

Sums of effects alone are kept, one array a group, so that memory does not grow with the number of seeds.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fimo.orchestrator.tables.intervals import GROUPS

Array = NDArray[np.float64]
BYTES = 512 * 2**20
"""What the sums may take; four groups at least."""


class SeedGroups:
    """Sums of effects (R, T, m) over groups of whole seeds, dealt out in turn.

    Args:
        whole: bytes of a seed's effects at all steps, if these are of some of them: how many groups there are must not
            depend on that.
    """

    def __init__(self, whole: int | None = None) -> None:
        self._whole = whole
        self._sums: list[Array] = []
        self._counts: list[int] = []
        self.seeds = 0

    def add(self, effects: Array) -> None:
        """Take one whole seed."""
        most = max(4, min(GROUPS, BYTES // max(1, self._whole or effects.nbytes)))
        if len(self._sums) < most:
            self._sums.append(effects.copy())
            self._counts.append(1)
        else:
            group = self.seeds % most
            self._sums[group] += effects
            self._counts[group] += 1
        self.seeds += 1

    def __len__(self) -> int:
        return len(self._sums)

    def left_out(self, keep: NDArray[np.bool_]) -> Iterator[tuple[Array, int, Array, int]]:
        """(mean of a group, its seeds, mean of the others, their seeds) for each group; needs two groups.

        Args:
            keep: the removals that count, bool (R,).
        """
        if len(self) < 2:
            return
        # In the order of the groups: a pure function of the seeds.
        total = np.sum(self._sums, axis=0)[keep]
        for own, count in zip(self._sums, self._counts, strict=True):
            others = self.seeds - count
            yield own[keep] / count, count, (total - own[keep]) / others, others
