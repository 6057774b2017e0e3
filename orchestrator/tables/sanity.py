"""What a reader of the tables must be told first: results that are nonsense, or that say nothing. Pure functions.

Three kinds: further training that has left θᶠ's neighbourhood, effects that rounding drowns, amounts at which the seeds
do not agree with each other, so that no estimator has a ceiling to be held against.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fimo.orchestrator.tables.agreement import norm

Array = NDArray[np.float64]

EXPLODED = 100.0
"""Times the root mean square of g at θᶠ by which training on everything may move g before the result is nonsense."""
SHOWN = 4
"""Steps named in a line."""


def exploded(training_only: Array, scale: float) -> NDArray[np.bool_]:
    """The steps at which training on everything has moved g beyond reason, bool (T,).

    A model that has exploded is right on some evaluation examples all the same, so it is judged by all of them.

    Args:
        training_only: the baseline's delta, float64 (T, m).
        scale: the root mean square of g(z, θᶠ) over evaluation examples; 0 = unknown, nothing is beyond reason.
    """
    moved: Array = np.sqrt(np.square(training_only).mean(axis=1))
    return moved > EXPLODED * scale if scale > 0 else np.zeros(len(moved), dtype=bool)


def warnings(
    steps: Sequence[int],
    effects: Array,
    floor: Array,
    beyond: NDArray[np.bool_],
    ceilings: Sequence[float | None],
    seeds: int,
) -> Iterator[str]:
    """One line for each kind of nonsense, the worst first.

    Args:
        steps: the T recorded steps.
        effects: the attribution, float64 (R, T, m); ``floor``: the noise of such an effect, float64 (T, m).
        beyond: see ``exploded``, (T,).
        ceilings: by step, None = there is none.
        seeds: whole seeds that the attribution averages.
    """
    if beyond.any():
        yield (
            f"nonsense at {_steps(steps, beyond)}: training on everything moves g by more than {EXPLODED:.0f} times "
            "its size at the final model; lower the learning rate, clip, or train for fewer steps"
        )
    # Not ``undefined``: effects that are the same for every removal may be large all the same.
    drowned = ~beyond & ((norm(effects) <= floor * np.sqrt(len(effects))).mean(axis=1) > 0.5)
    if drowned.any():
        yield (
            f"nothing to see at {_steps(steps, drowned)}: rounding drowns the effects on most evaluation examples; use "
            "precision: float64, removal_weight above 1, more steps, or groups"
        )
    if seeds == 1:
        yield "one seed: no standard errors, and no ceiling to hold a score against; use more seeds"
        return
    without = np.array([ceiling is None for ceiling in ceilings]) & ~beyond & ~drowned
    if without.any():
        yield f"no ceiling at {_steps(steps, without)}: the seeds do not agree with each other there; use more seeds"


def is_nonsense(beyond: NDArray[np.bool_]) -> bool:
    """Whether the results are beyond reason at every step."""
    return bool(len(beyond)) and bool(beyond.all())


def _steps(steps: Sequence[int], where: NDArray[np.bool_]) -> str:
    chosen = [step for step, here in zip(steps, where, strict=True) if here]
    if len(chosen) == len(steps):
        return "every step"
    shown = ", ".join(map(str, chosen[:SHOWN])) + (f" and {len(chosen) - SHOWN} more" if len(chosen) > SHOWN else "")
    return f"step {shown}" if len(chosen) == 1 else f"steps {shown}"
