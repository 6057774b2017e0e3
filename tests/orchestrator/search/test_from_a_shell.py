"""``fimo search`` as from a shell, on Ray Tune."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from fimo.orchestrator.store import open_store
from fimo.orchestrator.tables import schemas
from tests.support.shell import Shell
from tests.support.small_sweep import SPEC, make_spec, run_here

SEARCH = {"estimators": ["grad_dot", {"name": "cg", "damping": {"from": 1e-2, "to": 1e2, "count": 5}}]}


def command(*words: object) -> list[str]:
    return [sys.executable, "-c", "from fimo.orchestrator.commands.main import main; main()", *map(str, words)]


@pytest.mark.slow
@pytest.mark.ray
def test_a_search_that_is_interrupted_ends_with_3_and_goes_on_to_the_same_best(
    tmp_path: Path, beside: Path, shell: Shell
):
    store = open_store(str(tmp_path / "store"))
    run_here(make_spec(), beside, store)
    spec = beside / "spec.yaml"
    spec.write_text(yaml.safe_dump({**SPEC, "search": SEARCH}), encoding="utf-8")
    words = command("search", spec, "--store", tmp_path / "store", "--json")
    environment = {**os.environ, "HOME": str(tmp_path)}
    first = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    objects = tmp_path / "store" / "flowers" / "search"
    deadline = time.monotonic() + 60
    while not list(objects.rglob("*.json")) and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=60)
    assert first.returncode in (0, 3), err
    stopped = json.loads(out)["estimators"]
    assert stopped["done"] >= 1
    if first.returncode == 3:
        assert "goes on from here" in err
        assert f"`fimo search {spec} --store {tmp_path / 'store'}`" in err
    options = {"capture_output": True, "text": True, "env": environment, "timeout": 90}
    whole = subprocess.run([*words, "--to", str(tmp_path / "out")], check=False, **options)
    assert whole.returncode == 0, whole.stderr
    found = json.loads(whole.stdout)["estimators"]
    assert (found["done"], found["computed"]) == (6, 6 - stopped["done"])
    table = pq.read_table(tmp_path / "store" / "flowers" / "tables" / "search.parquet")
    assert table.schema.equals(schemas.SEARCH)
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".parquet", ".svg", ".pdf", ".png"}
    # Nothing is owed, and no Ray is started for that.
    again = json.loads(shell("search", spec, "--store", tmp_path / "store", "--json").out)["estimators"]
    assert (again["computed"], again["best"]) == (0, found["best"])
    # Nothing of Tune's own stays behind.
    assert not list(tmp_path.rglob("ray_results"))
    assert not list((tmp_path / "store").rglob("*.pkl"))


def test_a_spec_without_the_section_and_a_sweep_not_run_are_usage_errors(shell: Shell, tmp_path: Path, beside: Path):
    spec = beside / "spec.yaml"
    spec.write_text(yaml.safe_dump(SPEC), encoding="utf-8")
    ended = shell("search", spec, "--store", tmp_path / "store")
    assert (ended.code, ended.out) == (2, "")
    assert "no section search" in ended.err
    spec.write_text(yaml.safe_dump({**SPEC, "search": SEARCH}), encoding="utf-8")
    ended = shell("search", spec, "--store", tmp_path / "store")
    assert (ended.code, ended.out) == (2, "")
    assert f"run it first, `fimo run {spec} --store {tmp_path / 'store'}`" in ended.err
    assert len(ended.err.splitlines()) == 1
