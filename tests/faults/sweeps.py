"""A small sweep of a user's module beside its spec, and what must hold of it after any fault."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from fimo.orchestrator.resolve.resolved import Resolved, resolve
from fimo.orchestrator.run import driver as runs
from fimo.orchestrator.run.driver import Listener, Report, Where
from fimo.orchestrator.run.places import in_process
from fimo.orchestrator.spec.spec import Spec, read
from fimo.orchestrator.store import LocalStore, Store
from fimo.orchestrator.sweep.parts import decode_part
from fimo.orchestrator.tables.schemas import SCHEMAS

HELPER = """
import torch

def target(x):
    return torch.sin(x).sum(dim=1)
"""

MODULE = '''
"""A user's workload: a small regression net."""
import os
import time

import torch

import faults_helper
from fimo.workers.workload import Workload

def outputs(model, batch):
    return model(batch["x"]).squeeze(-1)

def loss(out, batch):
    return (out - batch["y"]) ** 2

def make():
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(25, 4, generator=generator), torch.randn(5, 4, generator=generator)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    train = {"x": x, "y": faults_helper.target(x)}
    return Workload(model, train, {"x": z, "y": faults_helper.target(z)}, outputs, loss)
'''

SPEC = """
name: tiny
workload: faults_workload:make
removals: {every: 4, count: 5}
seeds: %d
further_training:
  optimizer: {name: sgd, lr: 0.05, momentum: 0.9}
  batch_size: 10
  epochs: %d
  removal_mode: drop
estimators: [grad_dot]
resources: {replicas: 4, shard: 3, witnesses: 0}
"""


def write_project(folder: Path, seeds: int = 3, epochs: int = 1) -> Path:
    """The user's folder: module, the module that it imports, and the spec, whose path is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "faults_helper.py").write_text(textwrap.dedent(HELPER))
    (folder / "faults_workload.py").write_text(textwrap.dedent(MODULE))
    (folder / "spec.yaml").write_text(SPEC % (seeds, epochs))
    return folder / "spec.yaml"


def resolved(spec: Path) -> Resolved:
    parsed: Spec = read(spec.read_text())
    return resolve(parsed, spec.parent)


def run_here(
    problem: Resolved,
    store: Store,
    where: Where = in_process,
    retry_failed: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """A run in this process."""
    listener = Listener(lambda plan, tasks: None, lambda task, result: None, say)
    return runs.run(problem, store, listener, where=where, retry_failed=retry_failed)


def tables(store: Store) -> dict[str, bytes]:
    """Every table that is a pure function of the spec, as bytes."""
    tables = {e.key.rsplit("/", 1)[-1]: store.get(e.key) for e in store.list("tiny/tables/")}
    return {name: data for name, data in tables.items() if name.endswith(".parquet") and name != "costs.parquet"}


def part_keys(store: Store) -> list[str]:
    return [e.key for e in store.list("tiny/parts/")]


def objects(store: Store) -> dict[str, bytes]:
    """Everything that was committed: parts and blocks of estimates."""
    return {e.key: store.get(e.key) for folder in ("parts", "estimates") for e in store.list(f"tiny/{folder}/")}


def held_cells(store: Store) -> Counter[tuple[int, tuple[int, ...]]]:
    """(seed, removed indices) -> the number of parts that hold the cell."""
    parts = [decode_part(store.get(key), key) for key in part_keys(store)]
    return Counter((part.seed, removal.indices) for part in parts for removal in part.removals)


def check_sound(store: Store, undisturbed: dict[str, bytes], cells: int) -> None:
    """The tables are those of the undisturbed run, byte for byte, and every cell is in exactly one part."""
    assert len(undisturbed) == len(SCHEMAS) - 1, "all but costs"
    assert tables(store) == undisturbed
    held = held_cells(store)
    assert set(held.values()) == {1}
    assert len(held) == cells
    manifest = json.loads(store.get("tiny/sweep.json"))
    assert len(manifest["removals"]) * manifest["spec"]["seeds"]["count"] == cells


def check_kept(store: Store, before: dict[str, bytes]) -> None:
    """What was committed before a resume is there unchanged after it, timings and host included."""
    after = objects(store)
    assert {key: after.get(key) for key in before} == before


def folder_store(folder: Path) -> LocalStore:
    return LocalStore(str(folder), folder)
