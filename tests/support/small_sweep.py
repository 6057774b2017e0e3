"""A small sweep of the user's own workload, run in this process on a store in memory or in a folder."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.run import driver as runs
from fimo.orchestrator.run.driver import Listener, Report
from fimo.orchestrator.run.places import in_process
from fimo.orchestrator.spec.spec import Spec, parse
from fimo.orchestrator.store import MemoryStore, Store

OWN = Path(__file__).parent / "own"

SPEC: dict[str, Any] = {
    "name": "flowers",
    "workload": "flowers:flowers",
    "removals": {"indices": [0, 3, 5, 11, 22]},
    "seeds": 4,
    "further_training": {
        "optimizer": {"name": "sgd", "lr": 0.1},
        "batch_size": 5,
        "epochs": 2,
        "removal_mode": "drop",
        "evaluate": {"every_steps": 3},
    },
    "estimators": ["grad_dot", "grad_cos"],
    # The proof takes longer than all the rest, and a trace longer than these few steps; tests of them turn them on.
    "resources": {"replicas": 3, "shard": 2, "witnesses": 0, "proof": False, "replay": False},
}


def make_spec(**changes: Any) -> Spec:
    """The small spec with top-level keys replaced; ``further_training`` and ``resources`` are merged."""
    values = copy.deepcopy(SPEC)
    for name, value in changes.items():
        values[name] = {**values[name], **value} if name in ("further_training", "resources") else value
    return parse(values)


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A folder with the user's module, as the spec's."""
    folder = tmp_path / "spec"
    shutil.copytree(OWN, folder)
    return folder


@pytest.fixture
def proven() -> Iterator[None]:
    """Small sweeps that are proven, as a user's are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SPEC["resources"], "proof", True)
        patch.setitem(SPEC["resources"], "replay", True)
        yield


@pytest.fixture
def traced() -> Iterator[None]:
    """Small sweeps whose steps are traced and replayed, as a user's are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SPEC["resources"], "replay", True)
        yield


class Heard:
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.tasks: list[object] = []
        self.results: list[object] = []

    def listener(self) -> Listener:
        return Listener(lambda plan, tasks: None, self._result, self.lines.append)

    def _result(self, task: object, result: object) -> None:
        self.tasks.append(task)
        self.results.append(result)


def run_here(spec: Spec, beside: Path, store: Store | None = None, **options: Any) -> tuple[Report, Store, Heard]:
    """Run a sweep in this process."""
    store = MemoryStore() if store is None else store
    heard = Heard()
    report = runs.run(resolve(spec, beside), store, heard.listener(), where=in_process, **options)
    return report, store, heard


def copied(store: Store) -> MemoryStore:
    """A store in memory with the objects of another, for a test that writes into a sweep that others read."""
    copy = MemoryStore()
    for entry in list(store.list("")):
        copy.put(entry.key, store.get(entry.key))
    return copy


def table_bytes(store: Store, name: str = "flowers") -> dict[str, bytes]:
    """The tables that are pure functions of the spec."""
    keys = [e.key for e in store.list(f"{name}/tables/")]
    return {k: store.get(k) for k in keys if not k.endswith(("costs.parquet", ".json"))}
