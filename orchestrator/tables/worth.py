"""What a further training is worth: reliability for a device-second, unless it is degenerate. Pure functions.

Reliability is that of the mean effects over the seeds trained (``tables/trust.py``, adjust baseline), and its price the
device-seconds of those seeds up to the step: the share of its steps that come before. By that alone the best further
training would be none at all: with a learning rate near 0 the effects of every seed are the gradient's, and agree
perfectly, while they vanish. So a step never wins at which

* a run has diverged, or training on everything has moved g beyond reason (``exploded``),
* most effects are under the noise floor (more than ``DROWNED`` of the pairs): they are rounding, or
* training on everything moves g by less than ``VANISHING`` of its size at θᶠ: too little to call it further training,
  however well it can be measured in float64.

A candidate is judged by the best of its steps that is left, and has no worth without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fimo.orchestrator.tables.advice import DROWNED

VANISHING = 1e-3
"""Root mean square of what training on everything does to g, in shares of the root mean square of g at θᶠ."""
NOTHING = -1.0
"""Worth of a candidate of which no step can be taken: below any other."""

DIVERGED, EXPLODED, UNDER, VANISHES, UNKNOWN = "diverged", "exploded", "under the floor", "vanishing", "unknown"


@dataclass(frozen=True)
class Worth:
    """A candidate at a step.

    Attributes:
        reliability: of the mean over the candidate's seeds; None if it cannot be told.
        distance: ‖Δθ‖ of the baseline; ``relative``: what it does to g, in shares of g at θᶠ.
        under_floor: share of (removal, eval) pairs.
        seconds: of the device, of a seed up to this step.
        fault: what speaks against the step; None if nothing does.
    """

    step: int
    reliability: float | None
    distance: float | None
    relative: float | None
    under_floor: float | None
    seconds: float
    fault: str | None

    def per_second(self, seeds: int) -> float | None:
        """Reliability for a device-second; None if the step is degenerate."""
        if self.fault is not None or self.reliability is None or self.seconds <= 0:
            return None
        return self.reliability / (self.seconds * seeds)


def fault_of(
    diverged: bool, exploded: bool, under_floor: float | None, relative: float | None, reliability: float | None
) -> str | None:
    """The worst that speaks against a step; None if nothing does."""
    if diverged:
        return DIVERGED
    if exploded:
        return EXPLODED
    if under_floor is None or under_floor > DROWNED:
        return UNDER
    if relative is None or relative < VANISHING:
        return VANISHES
    return UNKNOWN if reliability is None else None


def best_step(rows: Sequence[Worth], seeds: int) -> int | None:
    """The place of the row with the most reliability for a device-second; None if none can be taken."""
    found = [(value, -place) for place, row in enumerate(rows) if (value := row.per_second(seeds)) is not None]
    return -max(found)[1] if found else None


def objective(rows: Sequence[Worth], seeds: int) -> float:
    """What candidates are halved by: the worth of the best step, ``NOTHING`` without one."""
    place = best_step(rows, seeds)
    value = None if place is None else rows[place].per_second(seeds)
    return NOTHING if value is None else value
