"""Reading the witnesses of a sweep, each seed's beside the sweep's own effects of the same removals."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fimo.orchestrator.run import failures
from fimo.orchestrator.run.witness_plan import witness_tasks
from fimo.orchestrator.run.written import listed_witnesses
from fimo.orchestrator.store import NotFound
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.parts import BadPartError, Part
from fimo.orchestrator.sweep.sweep import Listed, Sweep
from fimo.orchestrator.tables.floor import Pair
from fimo.orchestrator.tables.reduce import witness_pair


@dataclass
class Witnesses:
    """What there is of a sweep's witnesses.

    Attributes:
        pairs: one for each seed that has witnesses.
        provenance: by seed.
        bad: (key, why) of those that did not verify; they count as missing.
        left_out: seed -> why it has none.
        missing: seeds that still lack theirs.
    """

    pairs: list[Pair] = field(default_factory=list)
    provenance: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    bad: list[tuple[str, str]] = field(default_factory=list)
    left_out: dict[int, str] = field(default_factory=dict)
    missing: int = 0


def read_witnesses(sweep: Sweep, manifest: Manifest, listed: Sequence[Listed]) -> Witnesses:
    """The witnesses that the spec asks for, as far as they are there; raises StoreError.

    Args:
        listed: the sweep's parts.
    """
    found = Witnesses()
    for seed in listed_witnesses(sweep, manifest):
        try:
            witness = sweep.read_witness(seed, manifest)
        except NotFound:
            continue
        except BadPartError as error:
            found.bad.append((keys.witness(sweep.name, manifest.digest, seed), str(error)))
            continue
        found.provenance[seed] = witness.provenance
        weight = manifest.spec.further_training.removal_weight
        found.pairs.append(witness_pair(_parts_with(sweep, manifest, listed, witness), witness, weight))
    wanted = {task.seed for task in witness_tasks(manifest)}
    recorded = failures.read(sweep, manifest).witnesses if wanted else {}
    found.left_out = {seed: why for seed, why in recorded.items() if seed in wanted - found.provenance.keys()}
    found.missing = len(wanted - found.provenance.keys() - found.left_out.keys())
    return found


def _parts_with(sweep: Sweep, manifest: Manifest, listed: Sequence[Listed], witness: Part) -> list[Part]:
    """Those of the seed's parts that verify and hold a removal of the witness, in the order of their keys."""
    wanted, parts = {r.indices for r in witness.removals}, list[Part]()
    for item in sorted((one for one in listed if one.seed == witness.seed), key=lambda one: one.key):
        if wanted & sweep.done(manifest, [item]).get(witness.seed, set()):
            # What does not verify is told when the seed is reduced.
            with contextlib.suppress(BadPartError, NotFound):
                parts.append(sweep.read_part(item.key, manifest))
    return parts
