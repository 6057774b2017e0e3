"""A sweep's effects with a control variate taken out, from the parts and the estimates that its store holds.

The control is an estimator that keeps a block for each seed that it trains with, asked for twice in the spec: once with
the sweep's own seeds, once with seeds after them. The arithmetic, and why it is unbiased, are in
``fimo.orchestrator.tables.control``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fimo import estimators
from fimo.estimators.own_seeds import OwnSeeds
from fimo.orchestrator.run.blocks import Named, assemble, common_steps, listed_blocks, runs_of, value_digest
from fimo.orchestrator.run.reading import Costs, Gathered, seed_blocks
from fimo.orchestrator.run.written import listed_parts
from fimo.orchestrator.sweep.estimates import EstimateBlock
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.parts import BadPartError
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables import schemas
from fimo.orchestrator.tables.control import CONTROLLED, LEAST, Controlled, control
from fimo.workers.errors import UsageError

Array = NDArray[np.float64]


def controlled(sweep: Sweep, by: str = "mirrored") -> pa.Table:
    """``CONTROLLED``: rows by removal, eval, step, at the steps that both estimates have.

    Seeds that lack a removal, or have one that diverged, are left out whole: ``seeds`` counts the others.

    Raises:
        UsageError: no such sweep; an estimator that trains no runs of its own; one of the two estimates is not asked
            for, or not complete; too few seeds.
        StoreError: the store cannot be read.
    """
    kind = estimators.REGISTRY.get(by)
    if kind is None or not issubclass(kind, OwnSeeds):
        fit = ", ".join(sorted(n for n, k in estimators.REGISTRY.items() if issubclass(k, OwnSeeds)))
        raise UsageError(f"'{by}' trains no runs of its own, so it shares no seed's noise: control by one of {fit}")
    manifest = sweep.read_manifest()
    effects = _effects(sweep, manifest)
    if len(effects) < LEAST:
        raise UsageError(f"{sweep.uri} has {len(effects)} whole seeds: a control needs {LEAST} at least")
    own, others = _both(manifest, by)
    of, beyond = (_by_seed(sweep, manifest, named) for named in (own, others))
    steps = [step for step in manifest.steps if all(step in seed for held in (of, beyond) for seed in held.values())]
    found = [
        control(
            np.stack([of_seed[:, manifest.steps.index(step)] for of_seed in effects.values()]),
            np.stack([of[seed][step] for seed in effects]),
            np.stack([of_seed[step] for of_seed in beyond.values()]),
        )
        for step in steps
    ]
    return _table(manifest, steps, found, len(effects))


def _effects(sweep: Sweep, manifest: Manifest) -> dict[int, Array]:
    """Seed -> effects (R, T, m), of whole seeds."""
    gathered, costs = Gathered({}, cells=manifest.cells), Costs()
    blocks = seed_blocks(sweep, manifest, listed_parts(sweep, manifest), gathered, costs, lambda line: None)
    return {block.seed: block.effects for block in blocks if block.complete}


def _both(manifest: Manifest, by: str) -> tuple[Named, Named]:
    """The estimator on the sweep's own seeds and on later ones, alike in all other hyper-parameters.

    Of several the first in spec order that will do; of those on later seeds the one with the most.
    """
    seeds = tuple(manifest.spec.seeds)
    asked = [(name, params) for name, params in manifest.estimators if name == by]
    own = [named for named in asked if _is_own(named) and runs_of(manifest, *named) == seeds]
    pairs = [
        (one, other)
        for one in own
        for other in asked
        if not _is_own(other) and _but_seeds(one) == _but_seeds(other) and len(runs_of(manifest, *other)) >= len(seeds)
    ]
    if not pairs:
        k = len(seeds)
        raise UsageError(
            f"a control by {by} needs two lines under estimators, run with the sweep: "
            f"{{name: {by}, own_seeds: true, seeds: {k}}} and {{name: {by}, seeds: {k}}} (or more, better 4 times as "
            "many), alike in all else"
        )
    return max(pairs, key=lambda pair: len(runs_of(manifest, *pair[1])))


def _is_own(named: Named) -> bool:
    return bool(json.loads(named[1]).get("own_seeds"))


def _but_seeds(named: Named) -> Mapping[str, object]:
    return {key: value for key, value in json.loads(named[1]).items() if key not in ("seeds", "own_seeds")}


def _by_seed(sweep: Sweep, manifest: Manifest, named: Named) -> dict[int, dict[int, Array]]:
    """Seed -> step -> the estimator's values with that seed alone, (R, m)."""
    digest, blocks = value_digest(manifest, *named), list[EstimateBlock]()
    for entry in dict(listed_blocks(sweep, manifest))[named]:
        try:
            blocks.append(sweep.read_block(entry.key, digest, *named))
        except BadPartError:
            # It counts as missing, which is told below.
            continue
    found: dict[int, dict[int, Array]] = {}
    for seed in runs_of(manifest, *named):
        matrix, steps = assemble(blocks, manifest, [seed]), common_steps(blocks, [seed])
        if matrix is None or steps is None:
            label = f"{named[0]} {named[1]}"
            raise UsageError(f"{label} is not complete for seed {seed}: `fimo resume {sweep.uri}` computes it")
        found[seed] = dict(zip(steps, matrix, strict=True))
    return found


def _table(manifest: Manifest, steps: Sequence[int], found: Sequence[Controlled], seeds: int) -> pa.Table:
    r, m = len(manifest.removals), manifest.evals
    t = len(steps)

    def column(values: Sequence[Array]) -> Array:
        # (T, R, m) to rows by removal, eval, step.
        return np.moveaxis(np.stack(values), 0, 2).reshape(-1) if values else np.zeros(0)

    return schemas.table(
        CONTROLLED,
        removal=np.repeat(np.array([x.number for x in manifest.removals], dtype=np.int32), m * t),
        eval=np.tile(np.repeat(np.arange(m, dtype=np.int32), t), r),
        step=np.tile(np.array(steps, dtype=np.int32), r * m),
        effect=column([one.mean for one in found]),
        sem=column([one.sem for one in found]),
        seeds=np.full(r * m * t, seeds, dtype=np.int32),
        plain_sem=column([one.plain_sem for one in found]),
    )
