"""A cell trained again, in two ways.

In the very stack that it was part of, with its shard's baseline: if device, threads, versions, kernels and stack size
are those of the part, its deltas must be the same bits. Otherwise its effect must agree to ten times the noise floor.

And by the plain definition (``fimo.workers.definition``), which finds what the engine gets wrong every time. Here its
effect must agree to what rounding does to the definition itself, measured from θᶠ moved by a few units in the last
place. Root mean squares over evaluation examples are compared, step by step, of effects as trained: not divided by the
removal weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fimo.orchestrator.resolve.at_hand import Own
from fimo.orchestrator.resolve.resolved import Resolved, resolve_again
from fimo.orchestrator.run.provenance import versions
from fimo.orchestrator.run.proving import engine_of_part
from fimo.orchestrator.sweep import keys, records
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.parts import Part
from fimo.orchestrator.sweep.sweep import Listed, Sweep
from fimo.workers.amounts import Removal
from fimo.workers.definition import train_cell
from fimo.workers.device import deterministic, device_name, pick_device
from fimo.workers.errors import FimoError, StoreError, UsageError
from fimo.workers.joined import Shards, train_again
from fimo.workers.shard import out_of_memory, release
from fimo.workers.stacking.products import multiplies
from fimo.workers.start import Start
from fimo.workers.trial import RELATIVE, SLACK, moved_state

FLOORS = 10.0
"""Noise floors that an effect may differ by if bits cannot be expected to agree."""
ROUNDING = 1e-12
"""The least tolerance, as a share of the largest delta: a float64 sweep's noise floor may be 0."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Rerun:
    """One cell trained again.

    Attributes:
        device: of the part; ``here``: of this rerun.
        exact: whether the same bits must come out; ``identical``: whether they did.
        difference: the effect's root mean square difference over evaluation examples, in units of the tolerance, at
            the step where it is largest; above 1 is a disagreement.
        definition: the same for the part's effect against the definition's, in units of measured rounding.
    """

    seed: int
    removal: int
    device: str
    here: str
    exact: bool
    identical: bool
    difference: float
    definition: float

    @property
    def ok(self) -> bool:
        """Whether the cell holds."""
        return (self.identical or (not self.exact and self.difference <= 1)) and self.definition <= 1


def rerun_cells(
    sweep: Sweep, manifest: Manifest, cells: Sequence[tuple[Listed, int]], floor: Array, own: Own
) -> list[Rerun]:
    """Train cells again on this machine.

    Args:
        cells: (part, row of it) of each.
        floor: the noise floor of differences of deltas by step, float64 (T,).
        own: where the user has the sweep's code.

    Raises:
        UsageError: the workload's code or data are not here, or not what they were.
        StoreError, BadPartError: a part cannot be read.
    """
    resolved = resolve_again(sweep, own)
    if resolved.manifest.digest != manifest.digest:
        raise UsageError("the workload's data or final model are not what they were when the sweep was run")
    device, starts = pick_device(manifest.spec.resources.gpus), list[Start]()
    reruns = []
    for listed, row in cells:
        part = sweep.read_part(listed.key, manifest)
        with _threads(_count(part, "threads")), deterministic(device):
            if not starts:
                starts.append(resolved.start(device))
            [start] = starts
            definition = _against_definition(resolved, part, row, start, floor)
            reruns.append(_rerun(sweep, manifest, part, row, start, floor, definition))
    return reruns


def _against_definition(resolved: Resolved, part: Part, row: int, start: Start, floor: Array) -> float:
    """How far the part's effect is from the definition's, in units of the tolerance; above 1 is a disagreement."""
    removal = part.removals[row].indices

    def train(cell: Removal, state: Mapping[str, Tensor] | None) -> Array:
        where: dict[str, Any] = {
            "device": start.model.device,
            "evals": resolved.manifest.evals,
            "forward": start.forward,
        }
        return train_cell(resolved.workload, start.settings, cell, part.seed, state=state, **where).deltas.numpy()

    moved = moved_state(start)
    baseline, cell = train((), resolved.state), train(removal, resolved.state)
    rounding = np.stack([train((), moved) - baseline, train(removal, moved) - cell])
    tolerance = np.maximum(SLACK * np.sqrt((rounding**2).mean(axis=2)).max(axis=0), FLOORS * floor)
    tolerance = np.maximum(tolerance, RELATIVE[start.settings.precision] * np.abs(baseline).max(axis=1))
    effect = (part.deltas[row] - part.deltas[-2]) - (cell - baseline)
    return float((np.sqrt((effect**2).mean(axis=1)) / np.maximum(tolerance, np.finfo(np.float64).tiny)).max())


def _rerun(
    sweep: Sweep, manifest: Manifest, part: Part, row: int, start: Start, floor: Array, definition: float
) -> Rerun:
    replicas, mates = _count(part, "replicas"), _mates(sweep, manifest, part)
    device, here = str(part.provenance.get("device", "unknown")), device_name(start.model.device)
    # One that memory ran short for at a step that nobody recorded cannot be made again.
    exact = (
        mates is not None
        and device == here
        and part.provenance.get("versions") == versions()
        and part.provenance.get("replay") == manifest.spec.resources.replay
        # Those that do not say it were made before there was a choice.
        and part.provenance.get("products", "torch") == multiplies(start.model.device)
        and replicas == _count(part, "replicas_at_start")
    )
    own = start.using(engine_of_part(sweep, manifest, part.provenance))
    both = None
    if exact and mates is not None:
        try:
            both = train_again(own, *mates, row, replicas)
        except Exception as error:
            if not out_of_memory(error):
                raise
            exact = False
    if both is None:
        both = _beside_its_baseline(own, part, row)
    cell, baseline = (deltas.numpy() for deltas in both)
    identical = np.array_equal(cell, part.deltas[row]) and np.array_equal(baseline, part.deltas[-2])
    effect = (cell - baseline) - (part.deltas[row] - part.deltas[-2])
    least = ROUNDING * np.abs(part.deltas[[row, -2]]).max(axis=(0, 2))
    tolerance = np.maximum(FLOORS * floor, np.maximum(least, np.finfo(np.float64).tiny))
    difference = float((np.sqrt((effect**2).mean(axis=1)) / tolerance).max())
    return Rerun(part.seed, part.removals[row].number, device, here, exact, identical, difference, definition)


def _beside_its_baseline(start: Start, part: Part, row: int) -> tuple[Tensor, Tensor]:
    """A cell and its baseline, of other bits than the part's: in a stack of two, or one at a time.

    ``vmap`` may refuse the model, as it did in the sweep if the engine is not proven, and memory may not hold two.
    """
    shards: Shards = [([part.removals[row].indices], part.seed)]
    try:
        return train_again(start, shards, 0, 0, 2)
    except FimoError:
        raise
    except Exception:
        release()
    return train_again(start, shards, 0, 0, 1)


def _count(part: Part, name: str) -> int:
    """A number of the part's provenance, which its digest does not cover; 1 if what stands there is none."""
    value = part.provenance.get(name)
    return value if isinstance(value, int) and value > 0 else 1


def _mates(sweep: Sweep, manifest: Manifest, part: Part) -> tuple[Shards, int] | None:
    """The shards that the part's was trained with in one stack, and which is its own; None if they cannot be told."""
    if "together" not in part.provenance:
        return [([removal.indices for removal in part.removals], part.seed)], 0
    try:
        named = records.together(part.provenance)
        mine = keys.set_hash(part.removals)
        own = named.index((part.seed, mine))
        every = [
            (part.removals if name == mine else sweep.read_set(manifest.digest, name), seed) for seed, name in named
        ]
    except (ValueError, StoreError):
        return None
    shards = [([removal.indices for removal in removals], seed) for removals, seed in every]
    return (shards, own) if sum(1 + len(removals) for removals, _ in shards) <= records.MOST_TOGETHER else None


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(count, 1024))
    try:
        yield
    finally:
        torch.set_num_threads(before)
