"""A sweep that adds seeds until they are reliable; parts and records that do not verify, which are set aside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

from fimo.orchestrator.run import failures
from fimo.orchestrator.run.owed import owed_tasks
from fimo.orchestrator.run.plan import Plan
from fimo.orchestrator.run.reading import Gathered
from fimo.orchestrator.run.results import Outcome
from fimo.orchestrator.run.seeds import next_seeds
from fimo.orchestrator.run.work import Shard, Task
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.errors import FimoError, StoreError

ROUNDS = 3
"""Times that parts which do not verify are computed again before the run gives up."""


def with_its_seeds(manifest: Manifest, sweep: Sweep, exactly: bool = False) -> Manifest:
    """With as many seeds as the sweep has come to: a run that begins again takes none out of its tables meanwhile.

    Args:
        exactly: only of a sweep that chooses by the same removals, reliability and bounds, which the same choices lead
            to so many seeds; estimates alone choose none, and take those that there are.
    """
    seeds = manifest.spec.seeds
    if seeds.until_reliability is None:
        return manifest
    fresh = replace(manifest, settled=False)
    try:
        there = sweep.read_manifest()
    except FimoError:
        return fresh
    count = there.spec.seeds.count
    if there.digest != manifest.digest or not seeds.min <= count <= seeds.max:
        return fresh
    ours, theirs = ([r.indices for r in of.removals] for of in (manifest, there))
    same = (ours, seeds.model_copy(update={"count": count})) == (theirs, there.spec.seeds)
    if exactly and not (same and count >= seeds.count):
        return fresh
    return replace(manifest.with_seeds(count), settled=there.settled)


def grown(
    manifest: Manifest,
    sweep: Sweep,
    compute: Callable[[Manifest, list[Task], Plan], None],
    say: Callable[[str], None],
    outcome: Outcome,
    note: bool,
) -> Manifest:
    """Train shards in rounds of more seeds until they are reliable; estimates wait for the number to be settled.

    Args:
        note: keep in the store how far it is; not if that has the manifest of a larger sweep.
    """
    rounds = 0

    def goes_on() -> bool:
        return outcome.stopped is None

    while goes_on():
        tasks, plan = owed_tasks(manifest, sweep, failures.read(sweep, manifest))
        owed: list[Task] = [task for task in tasks if isinstance(task, Shard)]
        if owed:
            compute(manifest, owed, plan)
        more, met = next_seeds(sweep, manifest, say)
        reject(sweep, met, say)
        if met.bad and rounds < ROUNDS:
            rounds += 1
            continue
        if not goes_on():
            break
        if more is None:
            manifest = replace(manifest, settled=not met.bad)
        else:
            # Another driver of the sweep may be further by now.
            manifest, rounds = with_its_seeds(manifest.with_seeds(more), sweep, exactly=True), 0
        if note:
            sweep.write_manifest(manifest)
        if more is None:
            break
    return manifest


def reject_records(sweep: Sweep, digest: str, say: Callable[[str], None]) -> None:
    """Set verdicts on the engine and stack sizes that are none aside: workers may not, and make them anew."""
    for key in sweep.bad_records(digest):
        say(f"{key} is torn, or of another kind; set aside under {sweep.uri}/rejected and made anew")
        with contextlib.suppress(StoreError):
            sweep.reject(key)


def reject(sweep: Sweep, gathered: Gathered, say: Callable[[str], None]) -> None:
    """Set every bad object aside, so that the next round computes it again."""
    for key, why in gathered.bad:
        say(f"{why}; set aside under {sweep.uri}/rejected and computed again")
        try:
            sweep.reject(key)
        except StoreError:
            continue
