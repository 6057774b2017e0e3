"""A reduction that several processes share gives one process's tables, whatever happens to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from multiprocessing import Pipe

import numpy as np
import pytest

from benchmarks import made
from fimo.orchestrator.run import share, sharing
from fimo.orchestrator.run.blocks import value_digest
from fimo.orchestrator.run.gather import gather
from fimo.orchestrator.run.reading import Gathered
from fimo.orchestrator.store import open_store
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.estimates import EstimateBlock, encode_block
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Listed, Sweep
from fimo.orchestrator.tables.schemas import encode_table
from fimo.workers.errors import StoreError

SEEDS, REMOVALS, STEPS, EVALS = 7, 9, 5, 11


def manifest() -> Manifest:
    return made.manifest(SEEDS, REMOVALS, STEPS, EVALS, count=3)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Sweep:
    """Two parts a seed; one seed lacks a part, one has a torn one, cells of two and a baseline have diverged."""
    of, random = manifest(), np.random.default_rng(0)
    sweep = Sweep(open_store(str(tmp_path_factory.mktemp("store"))), of.spec.name)
    common = random.normal(size=(REMOVALS, STEPS, EVALS))
    for seed in range(SEEDS):
        for removals in (of.removals[:4], of.removals[4:]):
            deltas = random.normal(size=(len(removals) + 2, STEPS, EVALS))
            deltas[:-2] += common[[r.number for r in removals]]
            if seed in (1, 4):
                deltas[seed - 1, 2:] = np.nan
            if seed == 5:
                deltas[-2, 3:] = np.nan
            key, data = made.encoded(of, seed, removals, deltas, random.random(deltas.shape[:2]))
            if (seed, removals[0].number) != (2, 0):
                sweep.store.put(key, data[:-9] if (seed, removals[0].number) == (3, 4) else data)
    for number, (name, params) in enumerate(of.estimators):
        # Of every step, of some, and of the last alone, so that some share has no step of it.
        steps = [None, of.steps[:3:2], of.steps[-1:]][number]
        values = random.normal(size=(REMOVALS, EVALS) if steps is None else (len(steps), REMOVALS, EVALS))
        digest = value_digest(of, name, params)
        block = EstimateBlock(digest, name, params, of.removals, 0, steps, values, {**made.PROVENANCE, "notes": {}})
        key = keys.block(keys.estimates(sweep.name, digest, name, params), of.removals, 0, EVALS)
        sweep.store.put(key, encode_block(block)[0])
    return sweep


@pytest.fixture(scope="module")
def alone(sweep) -> Gathered:
    return gather(sweep, manifest(), processes=1)


@pytest.fixture
def started(monkeypatch) -> list[subprocess.Popen[bytes]]:
    found: list[subprocess.Popen[bytes]] = []
    own = sharing._process
    monkeypatch.setattr(sharing, "_process", lambda *at: found.append(own(*at)) or found[-1])
    return found


def same(one: Gathered, other: Gathered) -> bool:
    assert one.tables.keys() == other.tables.keys()
    differing = [name for name in one.tables if encode_table(one.tables[name]) != encode_table(other.tables[name])]
    assert differing == []
    return replace(one, tables={}) == replace(other, tables={})


@pytest.mark.parametrize("count", [2, 3])
def test_the_tables_and_what_was_met_are_one_process_s(sweep, alone, started, count, monkeypatch):
    said, slots, tell = list[str](), list[int](), sharing._Process.tell

    def noted(self: sharing._Process, what: object) -> None:
        slots.extend([what.slot] if isinstance(what, share.Read) else [])
        tell(self, what)

    monkeypatch.setattr(sharing._Process, "tell", noted)
    assert same(gather(sweep, manifest(), said.append, processes=count), alone)
    assert len(alone.bad) == 1
    assert alone.done == (SEEDS - 2) * REMOVALS + 5 + 4
    assert said == [f"reducing seed {seed} ({seed + 1} of {SEEDS})" for seed in range(SEEDS)]
    assert [process.poll() for process in started] == [0] * count
    # A seed is read while those of the round before are still being reduced.
    rounds = [set(slots[first : first + count]) for first in range(0, SEEDS, count)]
    assert not any(one & other for one, other in pairwise(rounds))


@pytest.mark.parametrize("at", ["0", "4"])
def test_a_process_that_is_killed_loses_and_doubles_nothing(sweep, alone, started, at):
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith(f"reducing seed {at}") and started[0].poll() is None:
            os.kill(started[0].pid, signal.SIGKILL)
            started[0].wait()

    assert same(gather(sweep, manifest(), say, processes=2), alone)
    [line] = [line for line in said if not line.startswith("reducing")]
    assert line == "a process that shares in the reduction has died (exit status -9); this process reduces alone"
    assert all(process.poll() is not None for process in started)


def test_where_no_process_can_begin_one_reduces_alone(sweep, alone, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    said: list[str] = []
    assert same(gather(sweep, manifest(), said.append, processes=2), alone)
    [line] = [line for line in said if not line.startswith("reducing")]
    assert line.startswith("no process can be started")


def test_an_interrupt_ends_every_process(sweep, started):
    def interrupted(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gather(sweep, manifest(), interrupted, processes=2)
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)


@pytest.mark.parametrize(
    ("error", "expected", "line"),
    [
        (StoreError("cannot read store s3://there: no answer"), StoreError, "cannot read store s3://there: no answer"),
        (MemoryError(), sharing.LostError, "has no memory left"),
        (ValueError("one\ntwo"), sharing.LostError, r"failed \(ValueError: one\)$"),
    ],
)
def test_what_goes_wrong_in_a_process_is_told_in_one_line(error, expected, line):
    own, other = Pipe()
    with own, other:
        answered = share._answered(Failing(error), share.Add(()))
        other.send(answered)
        with pytest.raises(expected, match=line):
            sharing._Process(subprocess.Popen(["true"]), own).answer()


class Failing(share.Worker):
    def __init__(self, error: Exception) -> None:
        self._error = error

    def answer(self, told: object) -> None:
        raise self._error


def test_only_many_parts_are_shared_and_no_more_than_there_are_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)

    def parts(count: int) -> list[Listed]:
        return [Listed("", 0, "", 2**27, datetime.now(UTC)) for _ in range(count)]

    assert [sharing.suited(parts(count)) for count in (0, 3, 4, 9, 1000)] == [1, 1, 2, 4, 8]


def test_a_process_that_shares_needs_no_torch():
    ask = f"import {share.__name__}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", ask], check=False).returncode == 0
