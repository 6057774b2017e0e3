"""The search over further training: candidates trained for more and more seeds, the worse half given up at each rung.

The first rung of candidates that differ in their learning rate alone is trained in the same stacks. Cells are parts in
the store, under each candidate's own digest; what a rung came to, and whether the candidate went on from it, are
objects of the search. A search that is begun again reads both, so that its halving takes the same decisions.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fimo.orchestrator.resolve.loading import read_final
from fimo.orchestrator.resolve.resolved import Resolved
from fimo.orchestrator.run import failures
from fimo.orchestrator.run.driver import note_sets, refuse_other
from fimo.orchestrator.run.gather import gather
from fimo.orchestrator.run.owed import current_plan, missing_witnesses
from fimo.orchestrator.run.rates import train_rates
from fimo.orchestrator.run.reading import Gathered
from fimo.orchestrator.run.results import NoWitnessError
from fimo.orchestrator.run.tasks import run_task
from fimo.orchestrator.run.weighing import proven_whole
from fimo.orchestrator.search.candidates import Candidate, candidates_of, groups_of
from fimo.orchestrator.search.estimators import Listener
from fimo.orchestrator.search.place import Place
from fimo.orchestrator.search.records import Records
from fimo.orchestrator.spec.canonical import digest
from fimo.orchestrator.spec.search import SearchedTraining
from fimo.orchestrator.store import Store
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables.amounts import amounts
from fimo.orchestrator.tables.worth import Worth, best_step, fault_of, objective
from fimo.workers.errors import FimoError, UsageError

FIRST = 2
"""Seeds of the first rung: fewer say nothing of their own noise."""
RELIABLE = 0.5


def rungs_of(most: int) -> tuple[int, ...]:
    """2, 4, 8 … below ``most``, and ``most``."""
    below = [FIRST * 2**power for power in range(30) if FIRST * 2**power < most]
    return (*below, most)


@dataclass(frozen=True)
class Rung:
    """A candidate with so many seeds: its steps, and the device it was trained on."""

    candidate: Candidate
    seeds: int
    rows: tuple[Worth, ...]
    device: str
    stopped: bool = False


@dataclass(frozen=True)
class FoundTraining:
    """What a search over further training has found.

    Attributes:
        last: each candidate's last rung, in the order of the spec, of those that have any.
        candidates: how many there are; ``computed``: rungs computed now.
        winner: place in ``last``, and step; None if no candidate can be taken.
        finished: every candidate has all its seeds, or was given up.
    """

    sweep: str
    last: tuple[Rung, ...]
    candidates: int
    computed: int
    winner: tuple[int, int] | None
    most: int
    seconds: float
    finished: bool
    stopped: str | None = None
    errors: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 complete, 1 failed, 3 stopped."""
        if self.stopped is not None:
            return 3
        return 1 if self.errors or self.winner is None or not self.finished else 0


def search_training(
    resolved: Resolved,
    store: Store,
    section: SearchedTraining,
    place: Place,
    listener: Listener,
    should_stop: Callable[[], str | None] = lambda: None,
) -> FoundTraining:
    """Train what the store lacks of the candidates, and choose.

    Args:
        place: where trials run; entered only if there is something to train.

    Raises:
        UsageError: a candidate that cannot be, too few removals, or a sweep of this name and another digest.
        FimoError: in one line.
    """
    began, sweep = time.monotonic(), Sweep(store, resolved.spec.name)
    store.check()
    if len(resolved.manifest.removals) < 2:
        raise UsageError("a search over further training needs two removals at least")
    refuse_other(resolved.manifest, sweep)
    candidates, rungs = candidates_of(resolved, section), rungs_of(section.seeds)
    try:
        sweep.read_manifest()
    except UsageError:
        # So that the store knows a sweep there, which `fimo remove` can take out again.
        sweep.write_manifest(resolved.manifest)
    about = ["further training", list(rungs), [[r.name, list(r.indices)] for r in resolved.manifest.removals]]
    records = Records(sweep, digest([about, sorted(one.name for one in candidates), resolved.spec.seeds.first]))
    final_model = read_final(resolved.spec, Path(resolved.manifest.beside))
    work = Raced(sweep, final_model, records, {one.name: one for one in candidates})
    kept = _decisions(work, rungs)
    owed = [name for name in work.candidates if not _finished(work, name, rungs, kept)]
    there = sum(work.read(name, rung) is not None for name in work.candidates for rung in rungs)
    listener.start(len(candidates), len(candidates) - len(owed))
    errors = dict[str, str]()
    if owed and should_stop() is None:
        with place(resolved.manifest) as trials:
            groups = {str(at): g for at, g in enumerate(groups_of(candidates)) if len(g) > 1 and work.untouched(g)}
            if groups:
                errors = trials(
                    list(groups), Together(sweep, final_model, groups), told=_nobody, should_stop=should_stop
                )
            if should_stop() is None and not errors:
                errors = trials(
                    owed,
                    work,
                    told=lambda name, rung: listener.say(f"{_named(work.candidates[name])}: {rung} seeds"),
                    should_stop=should_stop,
                    rungs=rungs,
                    kept=kept,
                    note=lambda name, rung, on: records.write(name, {"goes_on": on}, rung, decision=True),
                )
    kept = _decisions(work, rungs)
    last = [one for name in work.candidates if (one := _last(work, name, rungs, kept)) is not None]
    finished = all(_finished(work, name, rungs, kept) for name in work.candidates)
    return FoundTraining(
        sweep=sweep.uri,
        last=tuple(last),
        candidates=len(candidates),
        computed=sum(work.read(name, rung) is not None for name in work.candidates for rung in rungs) - there,
        winner=winner_of(last),
        most=section.seeds,
        seconds=time.monotonic() - began,
        finished=finished,
        stopped=None if finished else should_stop(),
        errors=tuple(errors.values()),
    )


def winner_of(last: list[Rung]) -> tuple[int, int] | None:
    """(place, step) of the most reliability for a device-second among the candidates with the most seeds.

    Of those that can be taken at all: candidates of fewer seeds were worse where they were compared, but count if none
    of more is left.
    """
    judged = [(rung.seeds, objective(rung.rows, rung.seeds), -place) for place, rung in enumerate(last)]
    good = [one for one in judged if best_step(last[-one[2]].rows, one[0]) is not None]
    if not good:
        return None
    place = -max(good)[2]
    at = best_step(last[place].rows, last[place].seeds)
    assert at is not None
    return place, last[place].rows[at].step


def _nobody(name: str, rung: int) -> None:
    """Nothing is told of a first rung before it is read."""


def _named(one: Candidate) -> str:
    return f"{one.optimizer} lr={one.lr:g} {one.removal_mode}"


def _decisions(work: Raced, rungs: tuple[int, ...]) -> dict[tuple[str, int], bool]:
    """(candidate, rung) -> whether it went on; of rungs that are there alone."""
    found = {}
    for name in work.candidates:
        for rung in rungs[:-1]:
            said = work.records.read(name, rung, decision=True) if work.read(name, rung) is not None else None
            if said is not None and isinstance(said.get("goes_on"), bool):
                found[name, rung] = said["goes_on"]
    return found


def _finished(work: Raced, name: str, rungs: tuple[int, ...], kept: Mapping[tuple[str, int], bool]) -> bool:
    last = _last(work, name, rungs, kept)
    return last is not None and (last.stopped or last.seeds == rungs[-1])


def _last(work: Raced, name: str, rungs: tuple[int, ...], kept: Mapping[tuple[str, int], bool]) -> Rung | None:
    found = None
    for rung in rungs:
        there = work.read(name, rung)
        if there is None:
            return found
        found = replace(there, stopped=not kept.get((name, rung), True))
        if found.stopped:
            return found
    return found


@dataclass(frozen=True)
class Together:
    """What a trial of the first rung does: candidates that differ in their learning rate, in the same stacks."""

    sweep: Sweep
    final_model: bytes | None
    groups: Mapping[str, tuple[Candidate, ...]]

    def __call__(self, name: str, rung: int, gpu: int) -> float:
        """Commit the parts of each; what cannot be trained so is left to the candidates' own trials."""
        manifests = [one.with_seeds(FIRST) for one in self.groups[name]]
        for of in manifests:
            note_sets(of, self.sweep, current_plan(of, self.sweep).shards)
        train_rates(self.sweep, manifests, self.final_model, gpu)
        return 0.0


@dataclass(frozen=True)
class Raced:
    """What a trial does, in its own process: a rung of a candidate trained, reduced and recorded."""

    sweep: Sweep
    final_model: bytes | None
    records: Records
    candidates: Mapping[str, Candidate]

    def untouched(self, group: tuple[Candidate, ...]) -> bool:
        """Whether nothing has been trained of any."""
        return not any(self.sweep.list_parts(one.name) for one in group)

    def read(self, name: str, rung: int) -> Rung | None:
        """What is recorded of a candidate's rung."""
        values = self.records.read(name, rung)
        try:
            return None if values is None else self._rung(name, rung, values)
        except (KeyError, TypeError, ValueError):
            return None

    def _rung(self, name: str, rung: int, values: Mapping[str, Any]) -> Rung:
        return Rung(self.candidates[name], rung, tuple(Worth(**row) for row in values["rows"]), str(values["device"]))

    def __call__(self, name: str, rung: int, gpu: int) -> float:
        """The candidate's worth with so many seeds."""
        there = self.read(name, rung)
        if there is None:
            of = self._as_proven(self.candidates[name].with_seeds(rung))
            self._train(of, gpu)
            rows, device = worth_rows(gather(self.sweep, of), of, self._reject)
            values = {"rows": [dataclasses.asdict(row) for row in rows], "device": device}
            self.records.write(name, values, rung)
            there = self._rung(name, rung, values)
        return objective(there.rows, rung)

    def _as_proven(self, of: Manifest) -> Manifest:
        """Do not prove again what was proven for another learning rate."""
        mine = self.candidates[of.digest]
        group = next(g for g in groups_of(tuple(self.candidates.values())) if mine in g)
        if len(group) > 1 and group[0].name != of.digest and proven_whole(group[0].manifest, self.sweep):
            resources = of.spec.resources.model_copy(update={"proof": False})
            return replace(of, spec=of.spec.model_copy(update={"resources": resources}))
        return of

    def _train(self, of: Manifest, gpu: int) -> None:
        shards = current_plan(of, self.sweep).shards
        note_sets(of, self.sweep, shards)
        for shard in shards:
            run_task(self.sweep, of, self.final_model, shard, gpu)
        for task in missing_witnesses(of, self.sweep, failures.Failures((), {}, {})):
            try:
                run_task(self.sweep, of, self.final_model, task, gpu)
            except NoWitnessError:
                # The floor is a lower bound then.
                continue

    def _reject(self, key: str) -> None:
        self.sweep.reject(key)


def worth_rows(gathered: Gathered, of: Manifest, reject: Callable[[str], None]) -> tuple[list[Worth], str]:
    """A candidate's steps, and its device.

    Raises:
        FimoError: an object does not verify; it is set aside, so that another try computes it again.
    """
    for key, _ in gathered.bad:
        reject(key)
    if gathered.bad:
        raise FimoError(f"{gathered.bad[0][1]}; it is set aside, and the same command computes it again")
    tables, seeds = gathered.tables, of.spec.seeds.count
    shards = [row for row in tables["costs"].to_pylist() if row["what"] == "shard"]
    seconds = sum(row["device_seconds"] for row in shards) / seeds
    distances = {row["step"]: row["distance"] for row in tables["amounts"].to_pylist() if row["distance"] is not None}
    bad_steps = {step for _, _, step in gathered.diverged}
    rows = [
        Worth(
            step=a.step,
            reliability=a.reliability,
            distance=a.distance,
            relative=a.relative,
            under_floor=a.under_floor,
            seconds=seconds * a.step / of.steps[-1],
            fault=fault_of(a.step in bad_steps, a.exploded, a.under_floor, a.relative, a.reliability),
        )
        for a in amounts(tables, of.steps, distances, _scale(tables["training_only"]), RELIABLE)
    ]
    return rows, str(shards[0]["device"]) if shards else ""


def _scale(training_only: pa.Table) -> float:
    """The root mean square of g at θᶠ over evaluation examples."""
    at_final = training_only["at_final"].to_numpy()
    return float(np.sqrt(np.square(at_final).mean())) if len(at_final) else 0.0
