"""A store that an enemy writes: every record's every value altered, and sealed anew. No traceback, no hang, no code."""

from __future__ import annotations

import copy
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fimo.orchestrator.cluster.jobs import Job
from fimo.orchestrator.run import pool
from fimo.orchestrator.run.schedule import in_process
from fimo.orchestrator.spec.canonical import canonical, sealed
from fimo.orchestrator.store import LocalStore, open_store
from fimo.orchestrator.sweep.sweep import Sweep
from tests.support.small_sweep import OWN, SPEC, make_spec, run_here

HOSTILE: list[Any] = [None, -1, 10**12, 0.5, float("inf"), "x", "\x1b[2J\x07", [], {}, [[[]]], "../../etc/passwd", True]
CONTROL = "\x1b[31m\x9b2J\u202e"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with a record of every kind, in a folder beside its code."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(OWN, root / "spec")
    store = open_store(str(root / "store"))
    resources = {**SPEC["resources"], "proof": True, "witnesses": 1, "replicas": "auto"}
    run_here(make_spec(seeds=2, resources=resources), root / "spec", store)
    digest = Sweep(store, "flowers").read_manifest().digest
    for key, values in {
        "jobs/fimo-flowers-1": vars(Job("fimo-flowers-1", "http://h:8265", "2026-01-01T00:00:00", "/x", {"a": "b"})),
        "drivers/host-1": {
            **{"host": "h", "pid": 1, "since": "2026", "every_s": 10.0, "cells": 10, "done": 3, "left": {"shard": 2}},
            **{"running": [{"task": "seed 0", "seconds": 1.0}], "elapsed_s": 1.0, "cells_per_second": 2.0},
            "finish_in_s": 3.0,
        },
        f"failed/{digest[:16]}-seed-0000000001-x": {
            **{"task": "seed 1", "seed": 1, "error": "it broke", "final": False, "budget": None, "traceback": ""},
            "when": "2026-01-01T00:00:00",
        },
        f"failed/{digest[:16]}-estimate-x": {
            **{"task": "cg", "estimator": "grad_dot", "params": "{}", "error": "it broke", "final": True},
            **{"budget": 1.0, "traceback": "", "when": "2026"},
        },
        f"failed/{digest[:16]}-witness-0000000000": {
            **{"task": "w", "witness": 0, "asked": 1, "error": "it broke", "final": True, "budget": None},
            **{"traceback": "", "when": "2026"},
        },
    }.items():
        store.put(f"flowers/{key}.json", canonical(values).encode())
    return root


@pytest.fixture
def store(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    """A copy of it; the user stands in the folder of the code, and no task reaches a cluster nor a socket a host."""
    shutil.copytree(made / "store", tmp_path / "store")
    monkeypatch.chdir(made / "spec")

    def refuse(*words: object, **more: object) -> None:
        raise AssertionError("it has reached out")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(pool, "on_ray", lambda address: in_process)
    opened = open_store(str(tmp_path / "store"))
    assert isinstance(opened, LocalStore)
    return opened


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value's parts are: itself, and the first and last of every list."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list) and value:
        for place in {0, len(value) - 1}:
            yield from leaves(value[place], (*path, place))


def changed(value: Any, path: tuple[Any, ...], to: Any) -> Any:
    if not path:
        return to
    value = copy.copy(value)
    value[path[0]] = changed(value[path[0]], path[1:], to)
    return value


def sealed_anew(values: Any) -> bytes:
    """Whoever may write to a store can seal what they like."""
    plain = {k: v for k, v in values.items() if k != "seal"} if isinstance(values, dict) else values
    try:
        return canonical(sealed(plain) if isinstance(plain, dict) and "seal" in values else plain).encode()
    except ValueError:
        return json.dumps(values).encode()


def said_well(ended: Any, what: object) -> None:
    assert ended.code in (0, 1, 2, 3), what
    assert "Traceback" not in ended.err, (what, ended.err)
    assert not set("\x1b\x9b\x07\u202e") & set(ended.out + ended.err), what
    if ended.code in (1, 2) and not ended.out:
        # Of what the sweep itself has to say there may be more.
        assert ended.err.strip().splitlines()[-1], what
