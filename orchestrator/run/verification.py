"""``fimo verify``: is what the store holds what it should be?

Reads every part and block of estimates (schema, digest, rows, finite values), and has random cells trained again here
(``fimo.orchestrator.run.rerun``).

Not here: setting bad parts aside and computing them again, which `fimo resume` does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fimo.orchestrator.resolve.at_hand import HERE, Own
from fimo.orchestrator.run import failures
from fimo.orchestrator.run.blocks import assemble, listed_blocks, runs_of, value_digest
from fimo.orchestrator.run.owed import missing_witnesses
from fimo.orchestrator.run.rerun import Array, Rerun, rerun_cells
from fimo.orchestrator.run.written import listed_parts, listed_witnesses
from fimo.orchestrator.store import NotFound
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.parts import BadPartError, Part
from fimo.orchestrator.sweep.sweep import Listed, Sweep


@dataclass
class Device:
    """What parts of one device type say of it: how many, and the squares of their noise floor (summed, counted)."""

    parts: int = 0
    squares: float = 0.0
    values: int = 0
    drift: float = 0.0

    @property
    def floor(self) -> float:
        """Root mean square difference of two baselines of one seed, per unit of removal weight."""
        return float(np.sqrt(self.squares / self.values)) if self.values else 0.0


@dataclass
class Verification:
    """What the objects of a sweep are, and how the cells trained again came out.

    Attributes:
        cells, done: of the sweep, and those in a part that verifies; ``owed``: estimators not complete;
            ``witnesses``: seeds whose witnesses are missing; ``settled``: no more seeds are to come.
        bad: one line for each object that does not verify.
        diverged: runs that are not finite.
        devices: by name; ``Device.drift`` is the root mean square difference of its baselines to those that another
            device gave for the same seed.
    """

    sweep: str
    cells: int = 0
    done: int = 0
    owed: int = 0
    witnesses: int = 0
    settled: bool = True
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
        return 0 if self.settled and self.done == self.cells and not (self.owed or self.witnesses) else 3

    def json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "sweep": self.sweep,
            "cells": self.cells,
            "done": self.done,
            "parts": self.parts,
            "estimate_blocks": self.blocks,
            "estimators_missing": self.owed,
            "witnesses_missing": self.witnesses,
            "settled": self.settled,
            "bad": self.bad,
            "diverged": self.diverged,
            "devices": {
                name: {"parts": d.parts, "noise_floor": d.floor, "drift": d.drift} for name, d in self.devices.items()
            },
            "reruns": [vars(r) | {"ok": r.ok} for r in self.reruns],
            "exit_code": self.exit_code,
        }


def verify(sweep: Sweep, rerun: int = 0, seed: int = 0, own: Own = HERE) -> Verification:
    """Read everything; train ``rerun`` random cells again.

    Args:
        seed: which cells are chosen.
        own: where the user has the sweep's code.

    Raises:
        UsageError: no such sweep, or the workload's code or data are not what they were.
        StoreError: the store cannot be read.
    """
    manifest = sweep.read_manifest()
    verification = Verification(sweep.uri, cells=manifest.cells, settled=manifest.settled)
    reading = _Reading(sweep, manifest, verification)
    good = reading.parts()
    reading.estimates()
    reading.witnesses()
    if rerun:
        cells = [(part, row) for part, rows in good for row in rows]
        chosen = np.random.default_rng(seed).permutation(len(cells))[:rerun]
        verification.reruns = rerun_cells(sweep, manifest, [cells[i] for i in sorted(chosen)], reading.floor(), own)
    return verification


class _Reading:
    """One pass over the objects; parts themselves are not kept."""

    def __init__(self, sweep: Sweep, manifest: Manifest, verification: Verification) -> None:
        self.sweep, self.manifest, self.into = sweep, manifest, verification
        self.squares = np.zeros(len(manifest.steps))
        self.values = 0

    def parts(self) -> list[tuple[Listed, list[int]]]:
        """Every part that verifies, with its rows that count: wanted, finite, and in no earlier part of the seed."""
        good, by_seed = [], dict[int, list[Listed]]()
        for listed in listed_parts(self.sweep, self.manifest):
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
            self.into.done += sum(r.indices in taken for r in self.manifest.removals)
        return good

    def _read(self, listed: Listed) -> Part | None:
        self.into.parts += 1
        try:
            part = self.sweep.read_part(listed.key, self.manifest)
        except (BadPartError, NotFound) as error:
            self.into.bad.append(str(error))
            return None
        self.into.diverged += len(part.diverged)
        return part

    def _device(self, part: Part, baselines: dict[str, Array]) -> None:
        name = str(part.provenance.get("device", "unknown"))
        device = self.into.devices.setdefault(name, Device())
        device.parts += 1
        baseline, second = part.deltas[-2], part.deltas[-1]
        difference = second - baseline
        if np.isfinite(difference).all():
            squares = (difference**2).sum(axis=1)
            self.squares, self.values = self.squares + squares, self.values + difference.shape[1]
            weight = self.manifest.spec.further_training.removal_weight
            device.squares += float(squares.sum()) / weight**2
            device.values += difference.size
        for other, theirs in baselines.items():
            drift = float(np.sqrt(((theirs - baseline) ** 2).mean()))
            if other != name and np.isfinite(drift):
                for one in (name, other):
                    self.into.devices[one].drift = max(self.into.devices[one].drift, drift)
        baselines.setdefault(name, baseline)

    def floor(self) -> Array:
        """The noise floor of deltas by step: root mean square over parts and evaluation examples, float64 (T,)."""
        return np.sqrt(self.squares / max(1, self.values))

    def witnesses(self) -> None:
        """Every seed's witnesses."""
        recorded = failures.read(self.sweep, self.manifest)
        self.into.witnesses = len(missing_witnesses(self.manifest, self.sweep, recorded))
        for seed in listed_witnesses(self.sweep, self.manifest):
            try:
                self.sweep.read_witness(seed, self.manifest)
            except (BadPartError, NotFound) as error:
                self.into.bad.append(str(error))

    def estimates(self) -> None:
        """Every block of estimates of the sweep."""
        left_out = failures.read(self.sweep, self.manifest).left_out
        for (estimator, params), entries in listed_blocks(self.sweep, self.manifest):
            digest = value_digest(self.manifest, estimator, params)
            blocks = []
            for entry in entries:
                self.into.blocks += 1
                try:
                    blocks.append(self.sweep.read_block(entry.key, digest, estimator, params))
                except (BadPartError, NotFound) as error:
                    self.into.bad.append(str(error))
            matrix = assemble(blocks, self.manifest, runs_of(self.manifest, estimator, params))
            self.into.owed += matrix is None and (estimator, params) not in left_out
