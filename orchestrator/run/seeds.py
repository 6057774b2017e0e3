"""How many seeds a sweep needs, from its parts: for ``fimo plan --from``, and for a sweep that adds seeds by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fimo.orchestrator.run.reading import Costs, Gathered, seed_blocks
from fimo.orchestrator.run.written import listed_parts
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables.groups import SeedGroups
from fimo.orchestrator.tables.planning import more_seeds, seeds_for_reliability, seeds_for_sem
from fimo.orchestrator.tables.reduce import Reduction, reduce
from fimo.orchestrator.tables.reliability import ADJUSTMENTS, Reliability
from fimo.workers.errors import UsageError


@dataclass(frozen=True)
class Reduced:
    """A sweep's seeds reduced, nothing scored.

    Attributes:
        keep: removals with a result at every step, bool (R,).
        gathered: what was met; ``costs``: of the parts.
    """

    reduction: Reduction
    keep: NDArray[np.bool_]
    gathered: Gathered
    costs: Costs

    @property
    def reliability(self) -> Reliability:
        """What the seeds say of their own mean, cosines alone."""
        return Reliability(self.reduction, SeedGroups(), self.keep)


def reduced(sweep: Sweep, manifest: Manifest, say: Callable[[str], None] = lambda line: None) -> Reduced:
    """Reduce whatever parts of the spec's seeds the store holds; raises StoreError."""
    gathered, costs = Gathered({}, cells=manifest.cells), Costs()
    blocks = seed_blocks(sweep, manifest, listed_parts(sweep, manifest), gathered, costs, say)
    blocks, reduction = reduce(blocks, len(manifest.removals), len(manifest.steps), manifest.evals)
    for _ in blocks:
        pass
    return Reduced(reduction, np.asarray((reduction.effects.count > 0).all(axis=1)), gathered, costs)


def next_seeds(sweep: Sweep, manifest: Manifest, say: Callable[[str], None]) -> tuple[int | None, Gathered]:
    """How many seeds a sweep with ``until_reliability`` should have next (None: these are enough), and what was met.

    A pure function of the parts of its seeds, so that a resumed sweep makes the same choices.
    """
    seeds = manifest.spec.seeds
    assert seeds.until_reliability is not None
    now = reduced(sweep, manifest)
    if now.gathered.bad:
        return None, now.gathered
    first = now if seeds.count == seeds.min else reduced(sweep, manifest.with_seeds(seeds.min))
    more = more_seeds(first.reliability, now.reliability, seeds.until_reliability, seeds.max)
    if more is not None and more <= seeds.count:
        # Seeds that are set aside are no reason to go round in circles.
        return None, now.gathered
    if more is not None:
        say(f"{seeds.count} seeds are not yet reliable to {seeds.until_reliability:g}: {more} seeds")
    return more, now.gathered


def needed_seeds(
    sweep: Sweep, reliability: float | None, sem: float | None, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Seeds that a sweep needs for a reliability or a standard error, by step, with device-hours.

    Args:
        reliability: wanted, the mean over evaluation examples; ``sem``: root mean square over pairs, in units of g.

    Raises:
        UsageError: no such sweep, or fewer than two whole seeds, which say nothing of their noise.
        StoreError: the store cannot be read.
    """
    manifest = sweep.read_manifest()
    found = reduced(sweep, manifest, say)
    of = found.reliability
    if not of.known:
        raise UsageError(
            f"{sweep.uri} has {of.seeds} whole {'seed' if of.seeds == 1 else 'seeds'}: two at least, of two removals, "
            "say how noisy a seed is"
        )
    rows: list[dict[str, int | None]] = []
    for place, step in enumerate(manifest.steps):
        wanted = {
            adjust: seeds_for_reliability(of, adjust, place, reliability) for adjust in ADJUSTMENTS if reliability
        }
        if sem is not None:
            wanted["sem"] = seeds_for_sem(found.reduction, found.keep, place, sem)
        rows.append({"step": step, **wanted})
    spent = sum(float(str(cost[4])) for cost in found.costs)
    each = spent / max(1, len(found.reduction.seeds))
    names = [name for name in rows[0] if name not in ("step", "mean")]
    reached = {name: [count for r in rows if (count := r[name]) is not None] for name in names}
    most = {name: max(counts, default=None) for name, counts in reached.items()}
    return {
        "sweep": sweep.uri,
        "seeds": of.seeds,
        "reliability": reliability,
        "sem": sem,
        "steps": rows,
        "wanted": most,
        "device_seconds_per_seed": each,
        "device_hours": {
            name: None if count is None else max(0, count - of.seeds) * each / 3600 for name, count in most.items()
        },
    }
