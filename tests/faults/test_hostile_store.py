"""A store that an enemy writes: every record's every value altered, and sealed anew. No traceback, no hang, no code."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fimo.orchestrator.cluster.jobs import Job
from fimo.orchestrator.resolve.at_hand import HERE, at_hand
from fimo.orchestrator.resolve.code import source_digest
from fimo.orchestrator.run import pool
from fimo.orchestrator.run.places import in_process
from fimo.orchestrator.spec.canonical import canonical, sealed
from fimo.orchestrator.store import LocalStore, open_store
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.errors import FimoError
from tests.support.shell import Ended
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
    monkeypatch.setattr(pool, "on_ray", lambda address, say=None: contextlib.nullcontext(in_process))
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


def said_well(ended: Ended, what: object) -> None:
    assert ended.code in (0, 1, 2, 3), what
    assert "Traceback" not in ended.err, (what, ended.err)
    assert not set("\x1b\x9b\x07\u202e") & set(ended.out + ended.err), what
    if ended.code in (1, 2) and not ended.out:
        # Of what the sweep itself has to say there may be more.
        assert ended.err.strip().splitlines()[-1], what


def enemy(folder: Path) -> Path:
    """A folder whose modules leave a file behind wherever they are imported, and the file."""
    mark = folder / "imported"
    folder.mkdir()
    text = f"open({str(mark)!r}, 'w').close()\n" + (OWN / "flowers.py").read_text()
    for name in ("flowers", "evil"):
        (folder / f"{name}.py").write_text(text)
    return mark


def shown(store: LocalStore) -> object:
    """The workload as a report would load it to show examples; None if it refuses."""
    try:
        return at_hand(Sweep(store, "flowers").read_manifest(), HERE, store.uri)
    except FimoError:
        return None


COMMANDS = (["resume"], ["rank"], ["verify", "--rerun", "1"], ["amount"])


@pytest.mark.parametrize(
    ("workload", "arguments"),
    [
        ("fimo.orchestrator.doctor:examine", {"store": None, "address": "http://enemy.example:8265"}),
        ("fimo.workers.workload:load_workload", {"reference": "evil:flowers", "arguments": {}, "beside": "ENEMY"}),
        ("fimo.workers.workload:Workload", {}),
        ("fimo.workers.workload:_import", {"module": "evil", "path": None, "beside": "ENEMY"}),
        ("fimo.orchestrator.resolve.at_hand:at_hand", {}),
        ("fimo.workers.workloads.recipe:save", {}),
        ("os:system", {"command": "touch ENEMY/imported"}),
        ("evil:flowers", {}),
        ("flowers:__class__", {}),
        ("flowers:_model", {}),
        ("this:flowers", {}),
    ],
)
def test_a_store_does_not_choose_what_code_runs(
    store: LocalStore, shell: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workload: str, arguments: Any
) -> None:
    """From a folder with the user's own code: with the right digest, the folder, its address or a flag in the store."""
    mark = enemy(tmp_path / "enemy")
    arguments = json.loads(json.dumps(arguments).replace("ENEMY", str(tmp_path / "enemy")))
    values = json.loads(store.get("flowers/sweep.json"))
    spec = {**values["spec"], "workload": workload, "workload_args": arguments}
    for beside in (tmp_path / "enemy", Path.cwd()):
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(tmp_path / "enemy"))
            try:
                source = source_digest(workload, beside)
            except Exception:
                source = values["source"]
        told = {**values, "spec": spec, "beside": str(tmp_path / "enemy"), "source": source}
        store.put("flowers/sweep.json", sealed_anew(told))
        sys.modules.pop("this", None)
        for words in (*COMMANDS, ["resume", "--trust"]):
            ended = shell(words[0], f"{store.uri}/flowers", *words[1:])
            assert ended.code in (1, 2), (words, ended)
            assert len(ended.err.strip().splitlines()) == 1, ended.err
        assert shown(store) is None
    assert not mark.exists()
    assert "this" not in sys.modules
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({**SPEC, "workload": workload, "workload_args": arguments}))
    assert shell("estimate", tmp_path / "spec.yaml", "--store", tmp_path / "other").code == 2
    assert not mark.exists()
    assert "this" not in sys.modules


def test_a_store_s_folder_is_never_looked_at_and_code_names_another(
    store: LocalStore, shell: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in COMMANDS:
        ended = shell(words[0], f"{store.uri}/flowers", *words[1:])
        assert (ended.code, len(ended.err.strip().splitlines())) == (2, 1)
        assert f"--code DIR (it was {made}/spec)" in ended.err
    found = shell("verify", f"{store.uri}/flowers", "--rerun", "1", "--code", made / "spec")
    assert found.code == 0, found.err


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../spec/flowers.py", "~/x", "s3://enemy/x", "a/../../b", "/dev/zero", "/proc/self/mem"]
)
def test_a_store_does_not_choose_which_files_are_read(store: LocalStore, shell: Any, name: str) -> None:
    values = json.loads(store.get("flowers/sweep.json"))
    for spec in ({"final_model": name}, {"workload_args": {"n": name}}):
        told = {**values, "spec": {**values["spec"], **spec}}
        store.put("flowers/sweep.json", sealed_anew(told))
        for words in (*COMMANDS, ["resume", "--address", "http://127.0.0.1:9"]):
            ended = shell(words[0], f"{store.uri}/flowers", *words[1:])
            assert (ended.code, len(ended.err.strip().splitlines())) == (2, 1), ended.err
            assert "if you know it, add --trust" in ended.err, ended.err


def test_a_file_of_removals_that_a_store_names_is_not_read(store: LocalStore, shell: Any) -> None:
    values = json.loads(store.get("flowers/sweep.json"))
    spec = {**values["spec"], "removals": {"from": "/etc/shadow"}}
    store.put("flowers/sweep.json", sealed_anew({**values, "spec": spec}))
    assert shell("verify", f"{store.uri}/flowers", "--rerun", "1").code == 0


HUGE = [
    ("seeds", 2**31 - 1, "seeds"),
    ("seeds", 900_000, "shards"),
    ("evals", 10**12, "evals"),
    ("removals", {"every": 1, "count": 2**31 - 1}, "names training example 23"),
    ("removals", {"fraction": 0.5, "count": 2**31 - 1}, "training examples in all"),
    ("removals", {"groups": {str(i): [i % 20] for i in range(20_000)}}, None),
    ("further_training", {"epochs": 2**31 - 1, "steps": None, "evaluate": {"every_epochs": 1}}, "evaluate less often"),
    ("further_training", {"epochs": None, "steps": 3_000_000, "evaluate": {"every_steps": 1}}, "evaluate less often"),
    ("further_training", {"epochs": 10**40}, "epochs"),
    ("resources", {"cpus": 0.00001}, "cpus"),
    ("resources", {"gpus": 0.00001}, "gpus"),
    ("resources", {"gpus": 1.5}, "whole number"),
    ("resources", {"shard": 10**12}, "shard"),
    ("final_model", "/dev/zero", "no regular file"),
    ("workload_args", {"n": json.loads("[" * 100 + "]" * 100)}, "nested too deeply"),
]


@pytest.mark.parametrize(("key", "value", "said"), HUGE, ids=lambda value: str(value)[:30])
def test_what_cannot_be_is_one_line_at_once(
    store: LocalStore, shell: Any, tmp_path: Path, made: Path, key: str, value: Any, said: str | None
) -> None:
    """From a stranger's spec, and from a store."""
    merged = {**SPEC, key: {**SPEC[key], **value} if key in ("further_training", "resources") else value}
    path = made / "spec" / "stranger.yaml"
    path.write_text(yaml.safe_dump(merged))
    began = time.monotonic()
    planned = shell("estimate", path, "--store", tmp_path / "other") if said else None
    if planned is not None:
        assert (planned.code, len(planned.err.strip().splitlines())) == (2, 1), planned.err
        assert str(said) in planned.err
    values = json.loads(store.get("flowers/sweep.json"))
    old = values["spec"][key]
    spec = {**values["spec"], key: {**old, **value} if key in ("further_training", "resources") else value}
    told = {**values, "spec": spec}
    if key == "evals":
        told |= {"evals": value, "eval_digests": []}
    store.put("flowers/sweep.json", sealed_anew(told))
    for command in ("status", "verify", "top"):
        said_well(shell(command, f"{store.uri}/flowers"), (command, key))
    assert time.monotonic() - began < 20


def test_what_a_store_says_is_shown_without_control_characters(store: LocalStore, shell: Any, tmp_path: Path) -> None:
    """Escapes of the terminal, and text that runs backwards, in everything that is shown of a sweep."""
    digest = Sweep(store, "flowers").read_manifest().digest
    values = json.loads(store.get("flowers/sweep.json"))
    values["beside"] += CONTROL
    values["removals"] = [[f"{name}{CONTROL}", indices] for name, indices in values["removals"]]
    values["left_out"] = [["cg", f"because{CONTROL}"]]
    values["names"] = [[0, f"id{CONTROL}", f"label{CONTROL}"]]
    store.put("flowers/sweep.json", sealed_anew(values))
    for entry in list(store.list("flowers/failed/")):
        body = json.loads(store.get(entry.key))
        store.put(entry.key, canonical({**body, "task": CONTROL, "error": f"it{CONTROL}"}).encode())
    driver = json.loads(store.get("flowers/drivers/host-1.json"))
    driver |= {"host": CONTROL, "running": [{"task": CONTROL, "seconds": 1.0}], "left": {CONTROL: 1}}
    store.put("flowers/drivers/host-1.json", canonical(driver).encode())
    for entry in list(store.list(f"flowers/proofs/{digest[:32]}")):
        verdict = json.loads(store.get(entry.key)) | {"device": f"d{CONTROL}", "lines": [CONTROL]}
        store.put(entry.key, canonical(verdict).encode())
    for words in (["status"], ["verify"], ["top"], ["resume", "--code", tmp_path], ["remove"], ["rank"]):
        ended = shell(words[0], f"{store.uri}/flowers", *words[1:])
        said_well(ended, words)
    said_well(shell("list", store.uri), "list")
    shell("report", f"{store.uri}/flowers", "--to", tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert not set("\x1b\x9b\u202e") & set(page)


@pytest.mark.parametrize("kind", ["sweep.json", "sets/", "failed/", "proofs/", "drivers/", "jobs/", "replicas/"])
def test_every_value_of_every_record_altered_is_no_traceback(
    store: LocalStore, shell: Any, tmp_path: Path, kind: str
) -> None:
    """A sample of what the long form of this tried: every leaf once, each with another hostile value."""
    commands = {"sweep.json": ("status", "verify", "top"), "jobs/": ("cancel", "logs")}.get(kind, ("status", "list"))
    turn = 0
    for entry in [e for e in store.list("flowers/") if kind in e.key and e.key.endswith(".json")]:
        data = store.get(entry.key)
        values = json.loads(data)
        for path in leaves(values):
            turn += 1
            store.put(entry.key, sealed_anew(changed(values, path, HOSTILE[turn % len(HOSTILE)])))
            command = commands[turn % len(commands)]
            said_well(shell(command, store.uri if command == "list" else f"{store.uri}/flowers"), (path, turn))
        store.put(entry.key, data)
