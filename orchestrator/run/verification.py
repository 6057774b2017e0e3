"""``fimo verify``: is what the store holds what it should be?

Reads every part and block of estimates (schema, digest, rows, finite values), and trains random cells again here. A
cell is trained again in the very stack it was part of, with its shard's baseline, so where the device, threads,
versions and stack size are those of the part its deltas must be the same bits. Elsewhere its effect must agree to ten
times the noise floor: root mean squares over evaluation examples are compared, step by step.

Not here: setting bad parts aside and computing them again, which `fimo resume` does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from fimo.orchestrator.commands import commands
from fimo.orchestrator.run import gather
from fimo.orchestrator.run.tasks import replicas_key, versions
from fimo.orchestrator.store import NotFound
from fimo.orchestrator.sweep import estimates as estimate_parts
from fimo.orchestrator.sweep.parts import BadPartError, Part
from fimo.orchestrator.sweep.sweep import Listed, Manifest, Sweep
from fimo.workers.device import deterministic, device_name, pick_device
from fimo.workers.errors import UsageError
from fimo.workers.shard import run_shard
from fimo.workers.start import Start
from numpy.typing import NDArray

FLOORS = 10.0
"""Noise floors that an effect may differ by where bits cannot be expected to agree."""
ROUNDING = 1e-12
"""The least tolerance, as a share of the largest delta: a float64 sweep's noise floor may be 0."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Rerun:
    """One cell trained again.

    Attributes:
        device: of the part; ``here``: of this rerun; ``exact``: whether the same bits must come out.
        identical: whether they did; ``difference``: largest ratio over steps of the effect's root mean square
            difference to the tolerance: above 1 is a disagreement.
    """

    seed: int
    removal: int
    device: str
    here: str
    exact: bool
    identical: bool
    difference: float

    @property
    def ok(self) -> bool:
        """Whether the cell holds."""
        return self.identical or (not self.exact and self.difference <= 1)


@dataclass
class Device:
    """What parts of one device type say of it: how many, and the squares of their noise floor (summed, counted)."""

    parts: int = 0
    squares: float = 0.0
    values: int = 0
    drift: float = 0.0

    @property
    def floor(self) -> float:
        """Root mean square difference of two baselines of one seed."""
        return float(np.sqrt(self.squares / self.values)) if self.values else 0.0


@dataclass
class Verification:
    """What was found.

    Attributes:
        cells, done: of the sweep, and those in a part that verifies; ``owed``: estimators not complete.
        bad: one line for each object that does not verify.
        diverged: runs that are not finite.
        devices: by name; ``Device.drift`` is the root mean square difference of its baselines to those that another
            device gave for the same seed.
    """

    sweep: str
    cells: int = 0
    done: int = 0
    owed: int = 0
    parts: int = 0
    blocks: int = 0
    bad: list[str] = field(default_factory=list)
    diverged: int = 0
    devices: dict[str, Device] = field(default_factory=dict)
    reruns: list[Rerun] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 all well, 1 something is wrong, 3 incomplete."""
        if self.bad or self.diverged or not all(r.ok for r in self.reruns):
            return 1
        return 0 if self.done == self.cells and not self.owed else 3

    def json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "sweep": self.sweep,
            "cells": self.cells,
            "done": self.done,
            "parts": self.parts,
            "estimate_blocks": self.blocks,
            "estimators_missing": self.owed,
            "bad": self.bad,
            "diverged": self.diverged,
            "devices": {
                name: {"parts": d.parts, "noise_floor": d.floor, "drift": d.drift} for name, d in self.devices.items()
            },
            "reruns": [vars(r) | {"ok": r.ok} for r in self.reruns],
            "exit_code": self.exit_code,
        }

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.sweep}: {self.parts} parts and {self.blocks} blocks of estimates read, {len(self.bad)} bad"
        yield f"{self.done} of {self.cells} cells there" + (f", {self.owed} estimators missing" if self.owed else "")
        yield from (f"bad: {line}; `fimo resume {self.sweep}` computes it again" for line in self.bad)
        if self.diverged:
            yield f"{self.diverged} results are not finite: lower the learning rate or clip"
        for name, device in sorted(self.devices.items()):
            drift = f", baselines differ from other devices' by {device.drift:.3g}" if device.drift else ""
            yield f"{name}: {device.parts} parts, noise floor {device.floor:.3g}{drift}"
        for r in self.reruns:
            how = "the same bits" if r.identical else f"differs by {r.difference:.3g} of the tolerance"
            wanted = "" if r.ok or not r.exact else ", and the same bits are due on the same device and versions"
            other = "" if r.device == r.here else f" ({r.device}, trained again on {r.here})"
            yield f"{'ok' if r.ok else 'WRONG'}: seed {r.seed}, removal {r.removal}: {how}{wanted}{other}"


def verify(uri: str, rerun: int = 0, seed: int = 0) -> Verification:
    """Read everything; train ``rerun`` random cells again.

    Args:
        seed: which cells are chosen.

    Raises:
        UsageError: no such sweep, or the workload's code or data are not what they were.
        StoreError: the store cannot be read.
    """
    sweep = commands.open_sweep(uri)
    manifest = sweep.read_manifest()
    found = Verification(sweep.uri, cells=len(manifest.removals) * manifest.spec.seeds.count)
    reading = _Reading(sweep, manifest, found)
    good = reading.parts()
    reading.estimates()
    if rerun:
        cells = [(part, row) for part, rows in good for row in rows]
        chosen = np.random.default_rng(seed).permutation(len(cells))[:rerun]
        found.reruns = _reruns(sweep, manifest, [cells[i] for i in sorted(chosen)], reading.floor())
    return found


class _Reading:
    """One pass over the objects; parts themselves are not kept."""

    def __init__(self, sweep: Sweep, manifest: Manifest, found: Verification) -> None:
        self.sweep, self.manifest, self.found = sweep, manifest, found
        self.squares = np.zeros(len(manifest.steps))
        self.values = 0

    def parts(self) -> list[tuple[Listed, list[int]]]:
        """Every part that verifies, with its rows that count: wanted, finite, and in no earlier part of the seed."""
        seeds = set(self.manifest.spec.seeds)
        good, by_seed = [], dict[int, list[Listed]]()
        for listed in self.sweep.list_parts(self.manifest.digest):
            if listed.seed in seeds:
                by_seed.setdefault(listed.seed, []).append(listed)
        wanted = {r.indices: r.number for r in self.manifest.removals}
        for each in by_seed.values():
            taken: set[tuple[int, ...]] = set()
            baselines: dict[str, Array] = {}
            for listed in sorted(each, key=lambda p: p.key):
                part = self._read(listed)
                if part is None:
                    continue
                self._device(part, baselines)
                fresh = [i for i, r in enumerate(part.removals) if r.indices in wanted and r.indices not in taken]
                taken |= {part.removals[i].indices for i in fresh}
                finite: NDArray[np.bool_] = np.asarray(np.isfinite(part.deltas).all(axis=(1, 2)))
                good.append((listed, [i for i in fresh if finite[i] and finite[-2]]))
            self.found.done += sum(r.indices in taken for r in self.manifest.removals)
        return good

    def _read(self, listed: Listed) -> Part | None:
        self.found.parts += 1
        try:
            part = self.sweep.read_part(listed, self.manifest.digest)
            if part.steps != self.manifest.steps or part.deltas.shape[2] != self.manifest.evals:
                raise BadPartError(f"part {listed.key}: its steps or evaluation examples are not the sweep's")
        except (BadPartError, NotFound) as error:
            self.found.bad.append(str(error))
            return None
        self.found.diverged += len(part.diverged)
        return part

    def _device(self, part: Part, baselines: dict[str, Array]) -> None:
        name = str(part.provenance.get("device", "unknown"))
        device = self.found.devices.setdefault(name, Device())
        device.parts += 1
        baseline, second = part.deltas[-2], part.deltas[-1]
        difference = second - baseline
        if np.isfinite(difference).all():
            squares = (difference**2).sum(axis=1)
            self.squares, self.values = self.squares + squares, self.values + difference.shape[1]
            device.squares, device.values = device.squares + float(squares.sum()), device.values + difference.size
        for other, theirs in baselines.items():
            drift = float(np.sqrt(((theirs - baseline) ** 2).mean()))
            if other != name and np.isfinite(drift):
                for one in (name, other):
                    self.found.devices[one].drift = max(self.found.devices[one].drift, drift)
        baselines.setdefault(name, baseline)

    def floor(self) -> Array:
        """The noise floor by step: root mean square over parts and evaluation examples, float64 (T,)."""
        return np.sqrt(self.squares / max(1, self.values))

    def estimates(self) -> None:
        """Every block of estimates of the sweep."""
        for (estimator, params), entries in gather.listed_estimates(self.sweep, self.manifest):
            blocks = []
            for entry in entries:
                self.found.blocks += 1
                try:
                    block = estimate_parts.decode_block(self.sweep.store.get(entry.key), entry.key)
                    if (block.estimator, block.params) != (estimator, params):
                        raise BadPartError(f"estimates {entry.key}: they belong under another key")
                    blocks.append(block)
                except (BadPartError, NotFound) as error:
                    self.found.bad.append(str(error))
            self.found.owed += gather.assemble(blocks, self.manifest) is None


def _reruns(sweep: Sweep, manifest: Manifest, cells: Sequence[tuple[Listed, int]], floor: Array) -> list[Rerun]:
    _, resolved = commands.resume(sweep.uri)
    if resolved.manifest.digest != manifest.digest:
        raise UsageError("the workload's data or final model are not what they were when the sweep was run")
    device, starts = pick_device(manifest.spec.resources.gpus), list[Start]()
    found = []
    for listed, row in cells:
        part = sweep.read_part(listed, manifest.digest)
        with _threads(_count(part, "threads")), deterministic(device):
            if not starts:
                starts.append(resolved.prepared.start(device))
            [start] = starts
            found.append(_rerun(sweep, manifest, part, row, start, floor))
    return found


def _rerun(sweep: Sweep, manifest: Manifest, part: Part, row: int, start: Start, floor: Array) -> Rerun:
    replicas = _count(part, "replicas")
    rows = _stack_mates(row, len(part.removals), replicas)
    result = run_shard(start, [part.removals[i].indices for i in rows], part.seed, replicas)
    ours = result.deltas.numpy()
    cell, baseline = ours[rows.index(row)], ours[-2]
    identical = np.array_equal(cell, part.deltas[row]) and np.array_equal(baseline, part.deltas[-2])
    effect = (cell - baseline) - (part.deltas[row] - part.deltas[-2])
    least = ROUNDING * np.abs(part.deltas[[row, -2]]).max(axis=(0, 2))
    tolerance = np.maximum(FLOORS * floor, np.maximum(least, np.finfo(np.float64).tiny))
    difference = float((np.sqrt((effect**2).mean(axis=1)) / tolerance).max())
    device, here = str(part.provenance.get("device", "unknown")), device_name(start.model.device)
    exact = (
        device == here
        and part.provenance.get("versions") == versions()
        and result.replicas == replicas == _asked_replicas(sweep, manifest, device)
    )
    return Rerun(part.seed, part.removals[row].number, device, here, exact, identical, difference)


def _count(part: Part, name: str) -> int:
    """A number of the part's provenance, which its digest does not cover: 1 where it is none."""
    value = part.provenance.get(name)
    return value if isinstance(value, int) and value > 0 else 1


def _stack_mates(row: int, removals: int, replicas: int) -> list[int]:
    """Rows whose shard makes the same stacks as the part's: the baseline's stack and the row's own.

    The cells of a part are the baseline and then its removals, cut into stacks of ``replicas``.
    """
    first = list(range(min(replicas - 1, removals)))
    start = (row + 1) // replicas * replicas - 1
    own = list(range(max(start, 0), min(start + replicas, removals)))
    return first if row < replicas - 1 else first + own


def _asked_replicas(sweep: Sweep, manifest: Manifest, device: str) -> int | None:
    """The stack size that shards began with: a part with a smaller one ran short of memory, no one knows where."""
    asked = manifest.spec.resources.replicas
    if asked != "auto":
        return asked
    try:
        return int(json.loads(sweep.store.get(replicas_key(sweep.name, manifest.digest, device)))["replicas"])
    except (NotFound, ValueError, KeyError, TypeError, RecursionError):
        return None


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(count, 1024))
    try:
        yield
    finally:
        torch.set_num_threads(before)
