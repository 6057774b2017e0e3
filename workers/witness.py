"""Witnesses of rounding: a few cells of a sweep trained again so that they round otherwise.

The difference between a cell's effect and its witness's is what rounding has made of the effect: a *measured* noise
floor. A second baseline in another stack rounds almost as the first does, and says far less (on Concrete 1e-7 where
float32 is off by 5e-5).

A float32 cell's witness is trained in float64. A float64 cell's starts from θᶠ moved by a unit in the last place, which
makes all further rounding another; so does a float32 cell's if its forward draws other random numbers in float64, which
would pass for rounding. Both of such a pair round, so their difference is up to √2 of what one has.

Most of what rounding does is rare and large: an example crosses a ReLU's kink in one precision and not in the other. A
few cells miss it. So more cells are trained in the sweep's own precision from θᶠ moved by ``MOVES`` units in the last
place, which makes such crossings as many times more frequent and no larger. ``fimo.orchestrator.tables.floor`` scales
them back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fimo.workers.amounts import BASELINE, Removal
from fimo.workers.draws import Draws
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.randomness import kept, seed_all
from fimo.workers.shard import ShardResult, run_shard
from fimo.workers.stacking.size import time_stack
from fimo.workers.start import Start, start_from
from fimo.workers.trial import moved_state
from fimo.workers.workload import Workload

WIDE, MOVED = "in float64", "from θᶠ moved by a unit in the last place"
"""How a witness may be trained."""
ALIKE = 1e-3
"""Difference of losses in two precisions, as a share of the largest, from which on the forwards drew otherwise."""
MOVES = 64.0
"""Units in the last place that θᶠ is moved by for what is rare to be seen."""
TIMED = 3
"""Steps that are timed; a witness is small, and so is what timing may cost."""


@dataclass(frozen=True)
class Witness:
    """What witnesses are trained with; ``how`` is ``WIDE`` or ``MOVED``."""

    start: Start
    how: str


def witness_start(workload: Workload, state: Mapping[str, Tensor] | None, start: Start) -> Witness:
    """The start of a sweep's witnesses, on its device and its engine.

    Args:
        state: θᶠ, None = the parameters that the workload's model carries.
        start: the sweep's own, with the engine that was proven for it.

    Raises:
        WorkloadError, DivergedError: see ``fimo.workers.start.start_from``; a forward that is written for float32.
    """
    if start.model.dtype is not torch.float64:
        wide = _start(workload, state, start, torch.float64)
        if _draws_alike(start, wide):
            return Witness(wide, WIDE)
    return Witness(_start(workload, moved_state(start, ulps=1.0), start, start.model.dtype), MOVED)


def train_witness(witness: Witness, removals: Sequence[Removal], seed: int, replicas: int) -> ShardResult:
    """Train the removals and their baseline once more; rows as in ``run_shard``, the baseline's twice."""
    return run_shard(witness.start, removals, seed, min(replicas, len(removals) + 1), second=False)


def train_moved(workload: Workload, start: Start, removals: Sequence[Removal], seed: int, replicas: int) -> ShardResult:
    """Train the removals and their baseline from θᶠ moved by up to ``MOVES`` units, another way for each seed.

    Args:
        start: the sweep's own, with the engine that was proven for it.
    """
    moved = _start(workload, moved_state(start, ulps=MOVES, seed=seed), start, start.model.dtype)
    return run_shard(moved, removals, seed, min(replicas, len(removals) + 1), second=False)


def beside(fine: ShardResult, moved: ShardResult) -> ShardResult:
    """Both in one: the rows of the removals, first the witnesses', then the moved; the two baselines last."""
    rows = [fine.deltas[:-2], moved.deltas[:-2], fine.deltas[-2:-1], moved.deltas[-2:-1]]
    distances = [fine.distances[:-2], moved.distances[:-2], fine.distances[-2:-1], moved.distances[-2:-1]]
    return replace(
        fine,
        deltas=torch.cat(rows),
        distances=torch.cat(distances),
        seconds=fine.seconds + moved.seconds,
        peak_bytes=max(fine.peak_bytes, moved.peak_bytes),
    )


def seconds_a_cell_step(start: Start, removals: Sequence[Removal], replicas: int) -> float:
    """Seconds of a step of one cell, if the removals and their baseline are trained ``replicas`` together."""
    lanes = [BASELINE, *removals][: replicas if start.engine.stack else 1]
    return time_stack(start, lanes, TIMED)


def _start(workload: Workload, state: Mapping[str, Tensor] | None, start: Start, dtype: torch.dtype) -> Start:
    device, settings = start.model.device, start.settings
    train, evals = (Examples(of, workload.collate, device, dtype) for of in (workload.train, workload.evals))
    model = FunctionalModel(workload, state, device, dtype, settings.trains)
    precision = replace(settings, precision="float64" if dtype is torch.float64 else "float32")
    return start_from(model, train, evals.first(len(start.examples)), precision, start.engine)


@torch.no_grad()
def _draws_alike(one: Start, other: Start) -> bool:
    """Whether the training forward draws the same numbers in both precisions, by its losses under one seed."""
    if not one.forward.random:
        return True
    losses = []
    for start in (one, other):
        model, size = start.model, min(len(start.train), start.settings.batch_size)
        with kept(model.device), model.mode(start.settings.mode), Draws():
            seed_all(0, model.device)
            buffers = {name: tensor.clone() for name, tensor in model.fixed.items()}
            losses.append(model.loss(model.params, start.train.batch(range(size)), buffers).double())
    return bool((losses[0] - losses[1]).abs().max() <= ALIKE * losses[1].abs().max())
