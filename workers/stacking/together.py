"""The cells of ``definition.attribution`` by stacks, in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fimo.workers.amounts import Removal
from fimo.workers.device import deterministic
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.settings import FurtherTraining
from fimo.workers.shard import run_shard
from fimo.workers.stacking.size import measure_stacks
from fimo.workers.start import Start, start_from
from fimo.workers.workload import Workload


def start_of(
    workload: Workload,
    settings: FurtherTraining,
    state: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> Start:
    """What the cells of a workload share, on a device and in the settings' precision; errors as ``start_from``."""
    dtype = getattr(torch, settings.precision)
    train, evals = (Examples(source, workload.collate, device, dtype) for source in (workload.train, workload.evals))
    return start_from(FunctionalModel(workload, state, device, dtype, settings.trains), train, evals, settings)


def train_together(
    workload: Workload,
    settings: FurtherTraining,
    removals: Sequence[Removal],
    seeds: Sequence[int],
    state: Mapping[str, Tensor] | None,
    device: torch.device | str,
) -> tuple[tuple[int, ...], Tensor]:
    """The recorded steps, and the deltas (S, R + 1, T, m), the baseline first."""
    with deterministic(torch.device(device)):
        start = start_of(workload, settings, state, device)
        stacks = measure_stacks(start, len(removals) + 1)
        start = start.using(replace(start.engine, abreast=stacks.abreast))
        shards = [run_shard(start, removals, seed, stacks.replicas) for seed in seeds]
    order = [len(removals), *range(len(removals))]
    return shards[0].steps, torch.stack([shard.deltas[order] for shard in shards])
