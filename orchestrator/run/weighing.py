"""A few cells of a sweep at several removal weights, which tell whether its effects are smooth and linear in them.

Each weight is a derived manifest: the sweep's, in reweight mode at that weight, with a few of its removals and seeds.
Its parts lie in the sweep's store under a digest of their own and are resumed like any; at the sweep's own weight and
mode they are the sweep's. The engine is proven at that weight, as the spec says. What is heavier may explode by right,
so that no two ways to train it agree: it takes the same engine unproven, if the proof gave nothing up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fimo.orchestrator.resolve.loading import read_final
from fimo.orchestrator.resolve.resolved import Resolved
from fimo.orchestrator.run.driver import Listener, Where, note_sets
from fimo.orchestrator.run.owed import current_plan
from fimo.orchestrator.run.plan import seeds_together
from fimo.orchestrator.run.proving import ENGINE
from fimo.orchestrator.run.reading import Costs, Gathered, seed_blocks
from fimo.orchestrator.run.schedule import drive
from fimo.orchestrator.run.written import listed_parts
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables.amounts import linearity, metasmoothness
from fimo.workers.errors import FimoError, UsageError

Array = NDArray[np.float64]
Stop = Callable[[], str | None]

TIMES = (1.0, 2.0, 10.0, 100.0)
"""Multiples of the sweep's own removal weight."""
LINEAR = ((10.0, 1.0), (100.0, 1.0), (100.0, 10.0))
"""Which are held against which; the last says more where the lightest drowns in rounding."""
REMOVALS, SEEDS = 4, 2


@dataclass(frozen=True)
class Weighed:
    """Effects of a few cells at several weights.

    Attributes:
        weight: the sweep's own, 1 in the modes that have none.
        steps: the sweep's T recorded steps; ``cells``: (removal's name, seed).
        effects: multiple of ``weight`` -> effects per unit of weight, float64 (cells, T, m), NaN if not finite; empty
            if the model has no reweight mode.
        trained: cells trained now.
        notes: what a reader must know.
    """

    weight: float
    steps: tuple[int, ...]
    cells: tuple[tuple[str, int], ...]
    effects: dict[float, Array]
    trained: int
    notes: tuple[str, ...]

    def at(self, step: int) -> dict[str, Any]:
        """Metasmoothness and linearity at a step, by the names of ``Amount``'s fields."""
        if not self.effects:
            return {}
        here = {times: effects[:, self.steps.index(step)] for times, effects in self.effects.items()}
        # An effect is per unit of weight; metasmoothness is of what a weight does as a whole.
        smooth = metasmoothness(self.weight * here[1.0], 2 * self.weight * here[2.0])
        known = smooth[~np.isnan(smooth)]
        return {
            "metasmoothness": float(known.mean()) if len(known) else None,
            "linear": tuple(linearity(w, v, here[w], here[v]) for w, v in LINEAR),
        }


def spread_evenly(removals: Sequence[NamedRemoval], most: int = REMOVALS) -> tuple[NamedRemoval, ...]:
    """At most so many of the removals, the first and the last among them."""
    places = np.linspace(0, len(removals) - 1, min(most, len(removals))).round().astype(int)
    return tuple(removals[place] for place in places)


def weigh(resolved: Resolved, sweep: Sweep, where: Where, listener: Listener, should_stop: Stop) -> Weighed:
    """Train what is missing of the cells, and read their effects.

    Raises:
        FimoError: a task failed, or was stopped: what is committed stays, and the same command goes on.
    """
    manifest = resolved.manifest
    section, seeds = manifest.spec.further_training, manifest.spec.seeds
    few = seeds.model_copy(update={"count": min(SEEDS, seeds.count)})
    removals, notes, trained = spread_evenly(manifest.removals), list[str](), 0
    cells = tuple((r.name, seed) for seed in few for r in removals)
    effects: dict[float, Array] = {}
    base, unproven = manifest, set[str]()
    try:
        every = {times: resolved.reweighted(section.removal_weight * times) for times in TIMES}
    except UsageError:
        line = (
            "no metasmoothness or linearity: the training forward mixes the examples of a batch, which has no weights"
        )
        return Weighed(section.removal_weight, manifest.steps, cells, {}, 0, (line,))
    if section.removal_mode != "reweight":
        notes.append(
            f"metasmoothness and linearity are of removal_mode reweight; the sweep's is {section.removal_mode}"
        )
    for times, derived in every.items():
        spec = derived.spec.model_copy(update={"seeds": few})
        of = replace(derived.manifest, spec=spec, removals=removals, estimators=())
        if times == 1:
            base = of
        elif proven_whole(base, sweep):
            resources = spec.resources.model_copy(update={"proof": False})
            of = replace(of, spec=spec.model_copy(update={"resources": resources}))
        weight = section.removal_weight * times
        trained += _train(of, sweep, where, listener, should_stop, f"removal weight {weight:g}")
        effects[times], devices = _read(of, sweep, of.digest != manifest.digest, listener)
        unproven |= set() if of.spec.resources.proof else devices - _proven_on(base, sweep)
    if unproven and manifest.spec.resources.proof:
        notes.append(f"cells at other removal weights were trained on {', '.join(sorted(unproven))}, unproven there")
    return Weighed(section.removal_weight, manifest.steps, cells, effects, trained, tuple(notes))


def proven_whole(of: Manifest, sweep: Sweep) -> bool:
    """Whether the engine has been proven with nothing given up, on every device type that it was proven on."""
    asked, verdicts = of.spec.resources, sweep.proofs(of.digest)
    wanted = {name: name != "replay" or asked.replay for name in ENGINE}
    # Of stacks that no task has, none is shown.
    wanted["join"] = seeds_together(of, len(of.removals)) > 1

    def whole(verdict: Mapping[str, Any]) -> bool:
        # Streams are a choice, and lacking where they were not the faster way; a way given up has its line.
        engine = {**verdict.get("engine", {}), "abreast": wanted["abreast"]}
        return engine == wanted and not verdict.get("lines")

    return bool(verdicts) and all(map(whole, verdicts))


def _proven_on(of: Manifest, sweep: Sweep) -> set[str]:
    return {verdict["device"] for verdict in sweep.proofs(of.digest)}


def _train(of: Manifest, sweep: Sweep, where: Where, listener: Listener, should_stop: Stop, what: str) -> int:
    """Have the missing cells of one weight trained; how many."""
    plan = current_plan(of, sweep)
    if not plan.shards:
        return 0
    note_sets(of, sweep, plan.shards)
    listener.say(f"{what}: {plan.missing} cells")
    listener.start(plan, len(plan.shards))
    with where(sweep, of, read_final(of.spec, Path(of.beside))) as pool:
        outcome = drive(plan.shards, pool, listener.result, should_stop)
    if outcome.set_aside or outcome.stopped:
        why = outcome.set_aside[0].line if outcome.set_aside else str(outcome.stopped)
        raise FimoError(f"{why}; what is done is kept, and the same command goes on from it")
    return plan.missing


def _read(of: Manifest, sweep: Sweep, own: bool, listener: Listener) -> tuple[Array, set[str]]:
    """Effects (seeds × removals, T, m) of one weight, and the device types that trained them.

    Args:
        own: the parts are of this weight alone, none of the sweep's.
    """
    gathered, costs = Gathered({}), Costs()
    silent: Callable[[str], None] = lambda line: None  # noqa: E731
    blocks = list(seed_blocks(sweep, of, listed_parts(sweep, of), gathered, costs, silent))
    for key, why in gathered.bad:
        if not own:
            raise FimoError(f"{why}; `fimo resume {sweep.uri}` computes it again")
        sweep.reject(key)
        listener.say(f"{why}; set aside under {sweep.uri}/rejected")
    if gathered.bad:
        raise FimoError(f"{gathered.bad[0][1]}; it is set aside, and the same command computes it again")
    return np.concatenate([block.effects for block in blocks]), {str(row[3]) for row in costs}
