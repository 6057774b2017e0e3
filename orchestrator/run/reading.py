"""A sweep's parts, read and verified, as one block of effects for each seed.

Imports no torch: the processes that share in a reduction (``run/share.py``) import this and the tables' arithmetic.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import pyarrow as pa

from fimo.orchestrator.store import NotFound
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.parts import BadPartError, Part
from fimo.orchestrator.sweep.sweep import Listed, Sweep
from fimo.orchestrator.tables.reduce import SeedBlock, seed_block

READERS = 4
"""Parts that are read and verified at once."""
Costs = list[tuple[object, ...]]
"""Rows of ``costs.parquet``."""


@dataclass
class Gathered:
    """Tables by name, and what was met on the way.

    Attributes:
        bad: (key, why) of objects that did not verify; they count as missing.
        gone: keys of objects that were listed and were not there any more: another driver has set them aside.
        diverged: (removal number or −1 for a baseline, seed, step).
        cells, done: of the whole sweep, and those with a verified part.
        estimators_wanted, estimators_done: those not left out of the default set, and those that are complete.
        witnesses_missing: seeds whose witnesses are still to be trained.
        settled: no more seeds are to come.
        devices: device types that parts come from.
        stamp: digest of everything the tables were made from; none that the store can have if that was in motion.
        warnings: what a reader of the tables must be told first.
        nonsense: the results are beyond reason at every step.
        coverage: share of the trainable scalars that an estimator's curvature covers, by (estimator, params).
    """

    tables: dict[str, pa.Table]
    bad: list[tuple[str, str]] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    diverged: list[tuple[int, int, int]] = field(default_factory=list)
    cells: int = 0
    done: int = 0
    estimators_wanted: int = 0
    estimators_done: int = 0
    witnesses_missing: int = 0
    settled: bool = True
    devices: list[str] = field(default_factory=list)
    stamp: str = ""
    warnings: list[str] = field(default_factory=list)
    nonsense: bool = False
    coverage: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def estimated(self) -> bool:
        """Whether every estimate is there."""
        return self.estimators_done == self.estimators_wanted

    @property
    def complete(self) -> bool:
        """Whether every cell, estimate and witness is there, and no seeds are to come."""
        return self.settled and self.done == self.cells and self.estimated and not self.witnesses_missing


def seed_blocks(
    sweep: Sweep,
    manifest: Manifest,
    listed: Sequence[Listed],
    gathered: Gathered,
    costs: Costs,
    say: Callable[[str], None],
    readers: int = READERS,
) -> Iterator[SeedBlock]:
    """One seed after another, from those of its parts that verify; ``gathered`` and ``costs`` note what is met."""
    weight, by_seed = manifest.spec.further_training.removal_weight, dict[int, list[Listed]]()
    for one in listed:
        by_seed.setdefault(one.seed, []).append(one)
    wanted = {r.indices for r in manifest.removals}
    every = [(seed, sorted(by_seed[seed], key=lambda p: p.key)) for seed in sorted(by_seed)]
    for number, (seed, found) in enumerate(_ahead(sweep, manifest, every, readers), start=1):
        parts: list[Part] = []
        for item, part in found:
            if isinstance(part, NotFound):
                gathered.gone.append(item.key)
                continue
            if isinstance(part, BadPartError):
                gathered.bad.append((item.key, str(part)))
                continue
            if not wanted & {r.indices for r in part.removals}:
                # Cells that a ranking has verified, or of an earlier form of the spec: no table's business.
                continue
            parts.append(part)
            costs.append(cost("shard", f"seed {seed} {item.set}", "", part.provenance))
        held = {r.indices for part in parts for r in part.removals} & wanted
        gathered.done += sum(r.indices in held for r in manifest.removals)
        say(f"reducing seed {seed} ({number} of {len(by_seed)})")
        if parts:
            yield seed_block(seed, parts, manifest.removals, manifest.steps, manifest.evals, weight)


def _ahead(
    sweep: Sweep, manifest: Manifest, every: Sequence[tuple[int, list[Listed]]], readers: int
) -> Iterator[tuple[int, list[tuple[Listed, Part | BadPartError | NotFound]]]]:
    """The parts of each seed, in order; the next seeds' are read and verified meanwhile, in threads."""

    def read(item: Listed) -> tuple[Listed, Part | BadPartError | NotFound]:
        try:
            return item, sweep.read_part(item.key, manifest)
        except (BadPartError, NotFound) as error:
            return item, error

    items = iter([item for _, of in every for item in of])
    with ThreadPoolExecutor(readers, thread_name_prefix="fimo-parts") as threads:
        # Few at once, whatever a seed has: so much memory do they take.
        ahead = deque(threads.submit(read, item) for item in islice(items, readers + 1))
        try:
            for seed, of in every:
                found = []
                for _ in of:
                    found.append(ahead.popleft().result())
                    ahead.extend(threads.submit(read, item) for item in islice(items, 1))
                yield seed, found
        finally:
            for waiting in ahead:
                waiting.cancel()


def cost(what: str, name: str, params: str, provenance: object) -> tuple[object, ...]:
    """A row of ``costs``."""
    values = provenance if isinstance(provenance, dict) else {}
    device, seconds, peak = (values.get(k) for k in ("device", "device_seconds", "peak_bytes"))
    return what, name, params, str(device or ""), float(seconds or 0.0), int(peak or 0)
