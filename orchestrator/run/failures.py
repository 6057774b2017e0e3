"""Tasks that were given up, as recorded under ``failed/``, and what each means for the sweep.

A task is *set aside*: it counts against the run until ``--retry-failed`` has it tried again. Or it is *left out*,
whatever it failed of, and the sweep is complete without it: an estimator of the default set, since nobody asked for it
by name, and a witness, without which the noise floor is a lower bound. An estimator that the spec names is never left
out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fimo.orchestrator.run.blocks import value_digest
from fimo.orchestrator.run.work import EstimateTask, Shard, Together, WitnessTask, Work, task_name
from fimo.orchestrator.spec.canonical import canonical, digest
from fimo.orchestrator.store import NotFound
from fimo.orchestrator.store.base import is_key
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.records import GivenUp
from fimo.orchestrator.sweep.records import read as read_record
from fimo.orchestrator.sweep.sweep import Sweep

if TYPE_CHECKING:
    from fimo.orchestrator.run.results import SetAside

OUT_OF_MEMORY = ("out of memory", "outofmemoryerror", "memoryerror", "can't allocate memory", "status_alloc_failed")
"""What errors of too little memory say: torch's on a GPU and on a CPU, Python's, Ray's, those of CUDA's libraries."""


@dataclass(frozen=True)
class Failure:
    """One task set aside.

    Attributes:
        id: the task's (see ``task_id``).
        line: what failed and how, in one line.
        final: the estimator itself cannot give values for this model: trying again gives the same.
    """

    id: str
    line: str
    final: bool = False

    @property
    def memory(self) -> bool:
        """Whether the task ran out of memory, which it does again on the same machine."""
        return any(said in self.line.lower() for said in OUT_OF_MEMORY)


@dataclass(frozen=True)
class Failures:
    """What the records of a sweep say.

    Attributes:
        aside: tasks set aside.
        left_out: (estimator, params) of the default set -> why it is left out, in one line.
        witnesses: seed -> why its witnesses are left out, in one line.
    """

    aside: tuple[Failure, ...]
    left_out: dict[tuple[str, str], str]
    witnesses: dict[int, str] = field(default_factory=dict)

    @property
    def ids(self) -> set[str]:
        """The tasks that are not to be tried again."""
        return {failure.id for failure in self.aside}


def task_id(manifest: Manifest, task: Work) -> str:
    """A name for a task that is the same in every run of it."""
    if isinstance(task, Together):
        return f"{manifest.digest[:16]}-seeds-{task.block:010d}-{keys.set_hash(task.shards[0].removals)}"
    if isinstance(task, Shard):
        return f"{manifest.digest[:16]}-seed-{task.seed:010d}-{keys.set_hash(task.removals)}"
    if isinstance(task, WitnessTask):
        return f"{manifest.digest[:16]}-witness-{task.seed:010d}"
    about = [task.estimator, task.params, keys.set_hash(task.removals), task.first]
    about += [] if task.seed is None else [task.seed]
    about += [] if task.at is None else ["at", task.at]
    return f"{manifest.digest[:16]}-estimate-{digest(about)[:16]}"


def record(manifest: Manifest, sweep: Sweep, given_up: SetAside) -> None:
    """Keep a task's error and traceback in the store; raises StoreError."""
    task = given_up.task
    about: dict[str, Any]
    if isinstance(task, Shard):
        about = {"seed": task.seed, "removals": [list(removal.indices) for removal in task.removals]}
    elif isinstance(task, WitnessTask):
        about = {"witness": task.seed, "asked": manifest.spec.resources.witnesses}
    else:
        about = {"estimator": task.estimator, "params": task.params, "block": _block_key(manifest, sweep, task)}
    body = {
        "task": task_name(task),
        **about,
        "error": given_up.line,
        "final": given_up.final,
        "budget": manifest.spec.resources.estimator_budget_s if given_up.dear else None,
        "traceback": given_up.traceback,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    sweep.store.put(keys.failed(sweep.name, task_id(manifest, task)), canonical(body).encode())


def _block_key(manifest: Manifest, sweep: Sweep, task: EstimateTask) -> str:
    of = value_digest(manifest, task.estimator, task.params, task.at)
    prefix = keys.estimates(sweep.name, of, task.estimator, task.params)
    return keys.block(prefix, task.removals, task.first, task.count, task.seed)


def read(sweep: Sweep, manifest: Manifest) -> Failures:
    """The records that are about tasks of the manifest; those of an earlier form of the spec are passed over.

    So are those of tasks whose results are there by now: another driver may have been able to.

    Raises:
        StoreError: the store cannot be read.
    """
    aside: list[Failure] = []
    left_out: dict[tuple[str, str], str] = {(name, "{}"): why for name, why in manifest.left_out}
    witnesses: dict[int, str] = {}
    committed = _Committed(sweep, manifest)
    for name, body in _records(sweep):
        if not name.startswith(manifest.digest[:16]):
            continue
        if body is None:
            aside.append(Failure(name, "its record cannot be read"))
            continue
        if body.witness is not None:
            # One for what it costs holds for the count that it was asked for under.
            if body.witness in manifest.spec.seeds and body.asked == manifest.spec.resources.witnesses:
                witnesses[body.witness] = body.error
            continue
        if committed.has(body):
            continue
        if body.seed is not None:
            wanted = body.seed in manifest.spec.seeds
        else:
            estimator = (str(body.estimator), str(body.params))
            wanted = estimator in manifest.estimators and _still_dear(body.budget, manifest)
            if wanted and manifest.spec.estimators is None:
                left_out[estimator] = body.error.removeprefix("estimator ").removeprefix(f"{estimator[0]}: ")
                continue
        if wanted:
            aside.append(Failure(name, f"{body.task}: {body.error}", body.final))
    return Failures(tuple(aside), left_out, witnesses)


class _Committed:
    """Which records are of tasks whose results the store holds; it is listed when first asked."""

    def __init__(self, sweep: Sweep, manifest: Manifest) -> None:
        self._sweep, self._manifest = sweep, manifest

    @cached_property
    def _cells(self) -> Mapping[int, set[tuple[int, ...]]]:
        return self._sweep.done(self._manifest, self._sweep.list_parts(self._manifest.digest))

    def has(self, body: GivenUp) -> bool:
        """Whether all cells of a shard, or the block of an estimator, are there."""
        if body.removals is not None and body.seed is not None:
            return {tuple(indices) for indices in body.removals} <= self._cells.get(body.seed, set())
        return body.block is not None and is_key(body.block) and any(self._sweep.store.list(body.block))


def _still_dear(budget: object, manifest: Manifest) -> bool:
    """Whether a record holds: one for cost does under the budget that it was made under, and if nobody names it."""
    if budget is None:
        return True
    return manifest.spec.estimators is None and budget == manifest.spec.resources.estimator_budget_s


def _records(sweep: Sweep) -> Iterator[tuple[str, GivenUp | None]]:
    """(task id, record) of every record; None for one that is none."""
    for entry in sweep.store.list(keys.failed(sweep.name)):
        try:
            found = read_record(GivenUp, sweep.store.get(entry.key))
        except NotFound:
            found = None
        body = None if found is None else found[0]
        about = None if body is None else [body.seed, body.witness, body.estimator]
        named = about is not None and sum(of is not None for of in about) == 1
        yield entry.key.rsplit("/", 1)[-1].removesuffix(".json"), body if named else None


def forget(sweep: Sweep) -> None:
    """Let every task that was given up be tried again; raises StoreError."""
    for entry in list(sweep.store.list(keys.failed(sweep.name))):
        sweep.store.delete(entry.key)
