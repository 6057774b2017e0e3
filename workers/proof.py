"""The proof of the engine: a few cells of the sweep by the plain definition and as the sweep will train them.

What makes further training fast (stacks, folded batches, traced steps) is trusted on a model, its data and a device
only after it has given the definition's numbers there. A way that gives others is given up: first several seeds in one
stack, then streams, then tracing, then folding, then stacking. If one replica at a time is still unequal, the sweep is
refused.

``fimo.workers.trial`` makes the comparison.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from itertools import product
from typing import Any

import torch

from fimo.workers.amounts import BASELINE, Removal, epoch_steps
from fimo.workers.batches import orders
from fimo.workers.definition import train_cell
from fimo.workers.errors import FimoError
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.settings import Evaluate
from fimo.workers.stacking.replay import AFTER
from fimo.workers.start import Engine, Start, start_from
from fimo.workers.trial import LENIENT, SEEDS, SLACK, Case, Differences, Trial, where

LEVELS = tuple(
    replace(level, abreast=abreast, join=join)
    for level in (
        Engine(),
        Engine(replay=False),
        Engine(replay=False, trim=False),
        Engine(replay=False, trim=False, fold=False),
        Engine(replay=False, trim=False, fold=False, stack=False),
    )
    for abreast, join in product((True, False), repeat=2)
    # Replicas abreast are worth it in a recorded step alone.
    if level.replay or not abreast
)
BUDGET_S = 60.0


class UnprovenError(FimoError):
    """Even one replica at a time the engine does not give the definition's numbers."""


@dataclass(frozen=True)
class Verdict:
    """What a proof found.

    Attributes:
        engine: what the sweep may use; ``path``: the same in words.
        precisions: largest differences by precision: of deltas and of effects, and what rounding alone makes.
        cells: the removals compared, as training indices; ``steps``: the steps after which they were compared.
        stacks: the sizes of the stacks that they were trained in.
        lines: one for each way that was given up, with the largest difference that it had.
    """

    engine: Engine
    path: str
    precisions: Mapping[str, Mapping[str, float]]
    cells: Sequence[Sequence[int]]
    steps: Sequence[int]
    stacks: Sequence[int]
    seconds: float
    lines: Sequence[str] = field(default_factory=tuple)

    def json(self) -> dict[str, Any]:
        """As plain values; a number that is not finite becomes None."""
        plain = asdict(self)
        plain["precisions"] = {
            precision: {name: value if math.isfinite(value) else None for name, value in numbers.items()}
            for precision, numbers in self.precisions.items()
        }
        return plain


def prove(case: Case, start: Start, budget_s: float = BUDGET_S) -> Verdict:
    """Compare the engine with the definition, from the fastest way down to the plainest.

    Args:
        start: the sweep's own, in its precision.
        budget_s: what the plain runs may cost; steps, then float64, are cut to it.

    Raises:
        UnprovenError: one replica at a time is unequal too.
    """
    begun = time.monotonic()
    step_s = _time_a_step(case, start)
    cells = choose_cells(case, len(start.train))
    if not start.joins:
        case = replace(case, joint=())
    count = len(cells) + (2 * SEEDS if case.joint else 0)
    steps = choose_steps(start, count, step_s, budget_s)
    trials = [Trial(case, start, cells, steps)]
    if case.settings.precision != "float64" and 3 * count * steps[-1] * step_s < budget_s:
        trials += _widened(case, start, cells, steps)
    lines: list[str] = []
    for engine, path in _ways(case, start):
        stacks = _stack_sizes(case) if engine.stack else [1]
        outcome = _hold(trials, engine, stacks, case.joint)
        if all(o.equal for o in outcome):
            precisions: dict[str, Mapping[str, float]] = {
                trial.precision: o.json() for trial, o in zip(trials, outcome, strict=False)
            }
            seconds = time.monotonic() - begun
            sizes = [*(case.joint if engine.join else ()), *stacks]
            return Verdict(engine, path, precisions, cells, steps, sizes, seconds, tuple(lines))
        worst = next(o for o in outcome if not o.equal)
        lines.append(f"{path}: {worst.line}")
    raise UnprovenError(
        f"further training does not give the definition's numbers on this model ({lines[-1]}): a model whose forward "
        "keeps state outside its parameters and buffers, or draws otherwise each time, cannot be trusted here"
    )


def _hold(trials: Sequence[Trial], engine: Engine, stacks: Sequence[int], joint: Sequence[int]) -> list[Differences]:
    """The engine held against the definition in the sweep's precision and, if there is memory for it, in float64."""
    own, *wide = trials
    # A stack that fits in float32 need not fit in float64.
    small = sorted({min(size, own.own) for size in stacks}, reverse=True)
    few = sorted({min(size, 2 + 2 * SEEDS) for size in joint}, reverse=True)
    try:
        widened = [trial.differences(engine, small, optional=True, joint=few) for trial in wide]
    except MemoryError:
        widened = []
    shown = bool(widened) and all(outcome.equal for outcome in widened)
    return [own.differences(engine, stacks, LENIENT if shown else SLACK, joint=joint), *widened]


def _ways(case: Case, start: Start) -> Iterator[tuple[Engine, str]]:
    """The ways that differ for this model, fastest first; what the sweep's own engine lacks is not tried."""
    seen = set()
    for engine in LEVELS:
        allowed = Engine(*(a and b for a, b in zip(astuple(engine), astuple(start.engine), strict=True)))
        # What no stack has shown is not allowed.
        allowed = replace(allowed, join=allowed.join and bool(case.joint))
        cut = start.trimming is not None or start.evals.places is not None
        kind = (
            allowed.replay and start.warms,
            allowed.trim and cut,
            allowed.fold and start.folds,
            allowed.stack,
            allowed.stack and allowed.join,
            allowed.stack and allowed.abreast,
        )
        if kind not in seen:
            seen.add(kind)
            yield allowed, _in_words(*kind)


def _in_words(traced: bool, cut: bool, folded: bool, stacked: bool, joined: bool, abreast: bool) -> str:
    if not stacked:
        return "one replica at a time"
    stacks = "stacked on streams" if abreast else "stacked"
    words = (("traced", traced), ("trimmed", cut), ("folded", folded), (stacks, True))
    used = [word for word, is_used in words if is_used]
    path = " and ".join([", ".join(used[:-1]), used[-1]] if len(used) > 1 else used)
    return f"{path}, several seeds together" if joined else path


# -- what is compared -----------------------------------------------------------------------------------------------


def choose_cells(case: Case, n: int) -> list[Removal]:
    """The baseline, the first, the last and a random removal, a group if there are groups, and one that acts at once.

    The last takes an example of the first batch, so that there is an effect to compare however few the steps are.
    """
    removals = list(case.removals)
    generator = torch.Generator().manual_seed(case.seed)
    chosen = [removals[0], removals[-1]]
    chosen.append(removals[int(torch.randint(len(removals), (1,), generator=generator))])
    chosen += [r for r in removals if len(r) > 1][:1]
    early = next(orders(n, case.seed))[min(case.settings.batch_size, n) // 2]
    chosen.append((int(early),))
    return [BASELINE, *dict.fromkeys(chosen)]


def choose_steps(start: Start, cells: int, step_s: float, budget_s: float) -> list[int]:
    """The steps after which deltas are compared: until all is traced that will be, and through the ends of two epochs.

    Fewer if that is dear, and never beyond the sweep's own last step.
    """
    per_epoch = epoch_steps(len(start.train), BASELINE, start.settings)
    last = start.settings.steps or per_epoch * (start.settings.epochs or 1)
    affordable = int(budget_s / 3 / max(1e-9, step_s * (cells + 2)))
    traced = AFTER + 3
    # Each epoch's ragged end is a signature of its own, traced after so many epochs.
    wanted = [(AFTER + 2) * per_epoch + 2, 2 * per_epoch + 2, per_epoch + 2, traced]
    steps = next((w for w in wanted if w <= affordable), min(traced, max(2, affordable)))
    steps = min(last, steps)
    count = traced if start.warms else 2
    return sorted({max(1, round(steps * (i + 1) / count)) for i in range(count)})


def _stack_sizes(case: Case) -> list[int]:
    """The full stack, the last and smaller one of a shard of each size, and a cell that is alone."""
    full = min(case.replicas, max(case.shards) + 1)
    sizes = {full, 1, *((shard + 1) % full for shard in case.shards)} - {0}
    return sorted(sizes, reverse=True)


def _time_a_step(case: Case, start: Start) -> float:
    """Seconds of a plain step, one evaluation's share included; the second of two runs."""
    settings = replace(start.settings, epochs=None, steps=2, evaluate=Evaluate(at_steps=(2,)))
    seconds = 0.0
    for _ in range(2):
        begun = time.monotonic()
        train_cell(case.workload, settings, BASELINE, case.seed, **where(case, start))
        seconds = time.monotonic() - begun
    return seconds / 2


def _widened(case: Case, start: Start, cells: list[Removal], steps: list[int]) -> list[Trial]:
    """The same in float64, if the model can be trained there."""
    wide = replace(case, settings=replace(case.settings, precision="float64"))
    try:
        train, evals = (
            Examples(source, case.workload.collate, case.device, torch.float64)
            for source in (case.workload.train, case.workload.evals)
        )
        model = FunctionalModel(case.workload, case.state, case.device, torch.float64, case.settings.trains)
        settings = replace(start.settings, precision="float64")
        return [Trial(wide, start_from(model, train, evals.first(case.evals), settings, start.engine), cells, steps)]
    except Exception:
        # A forward that is written for float32, or lacks the memory: the sweep's own precision decides.
        return []
