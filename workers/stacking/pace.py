"""How long a stack takes, from a few of its steps: for plans, never for a result."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fimo.workers.amounts import Removal, steps_recorded
from fimo.workers.device import clock
from fimo.workers.functional import Tensors
from fimo.workers.further_training import further_train
from fimo.workers.settings import Evaluate
from fimo.workers.start import Start

STEPS = 24
"""Steps that are timed, half of them with an evaluation."""


@dataclass(frozen=True)
class Pace:
    """Seconds of one step and of one evaluation of a whole stack, and what its first steps take beyond that.

    ``traced``: what tracing them took, once for each start that has not got these steps traced yet.
    """

    step: float
    evaluation: float
    first: float
    traced: float = 0.0

    def seconds(self, steps: int, evaluations: int) -> float:
        """Of a run of so many steps and evaluations."""
        return self.first + self.step * steps + self.evaluation * evaluations


class _EnoughError(Exception):
    """What is to be known is known."""


def pace(start: Start, lanes: Sequence[Removal], seed: int | Sequence[int], budget_s: float) -> Pace:
    """Time a stack over a few steps and evaluations as a long run takes them: traced, if its steps are.

    Args:
        lanes: the stack's removals; ``seed``: of all, or of each, as ``further_train`` has it.
        budget_s: timing ends at the first step and evaluation after so many seconds.

    Raises:
        FimoError: the stack cannot be trained; what torch raises, such as for want of memory.
    """
    last = steps_recorded(len(start.train), start.settings)[-1]
    warm = min(last - 1, start.first_steps)
    until = min(last, warm + STEPS)
    due = sorted({*range(1, warm + 1), *range(warm + 2, until + 1, 2), until})
    settings = replace(start.settings, epochs=None, steps=until, evaluate=Evaluate(at_steps=tuple(due)))
    cut = replace(start, settings=settings)
    traced = 0.0
    if start.graphs is not None:
        # Traces are made here, and are no part of what a step takes.
        before = start.graphs.seconds
        _step_times(cut, lanes, seed, budget_s, warm)
        traced = start.graphs.seconds - before
    times = _step_times(cut, lanes, seed, budget_s, warm)
    evaluated = [t for k, t in enumerate(times, 1) if k > warm and k in due]
    plain = [t for k, t in enumerate(times, 1) if k > warm and k not in due]
    if not plain:
        # One step that is evaluated too is all that there is: it counts as the step.
        plain, evaluated = evaluated or times[-1:], []
    # Steps that are replayed are alike but for an epoch's last, which is not yet replayed here: a long run replays it.
    usual = statistics.median if start.warms else statistics.fmean
    step = usual(plain)
    evaluation = max(0.0, usual(evaluated) - step) if evaluated else 0.0
    first = sum(times[:warm]) - warm * (step + evaluation)
    return Pace(step, evaluation, max(0.0, first), traced)


def _step_times(
    start: Start, lanes: Sequence[Removal], seed: int | Sequence[int], budget_s: float, warm: int
) -> list[float]:
    """Seconds of each step, its evaluation among them."""
    device = start.model.device
    read, times = clock(device), list[float]()
    began = before = read()

    def note(step: int, _params: Tensors) -> None:
        nonlocal before
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = read()
        times.append(now - before)
        before = now
        if now - began > budget_s and step >= warm + 2:
            raise _EnoughError

    with contextlib.suppress(_EnoughError):
        further_train(start, lanes, seed, watch=note)
    return times
