"""``fimo compare`` as a user types it, on sweeps in folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from fimo.orchestrator.store import open_store
from tests.support.small_sweep import OWN, make_spec, run_here

FIMO = [sys.executable, "-c", "from fimo.orchestrator.commands.main import main; main()"]


def compare(*arguments: object, cwd) -> subprocess.CompletedProcess[str]:
    command = [*FIMO, "compare", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=120, env=environment)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``drop/flowers`` and ``reweight/flowers``, and nothing of the workload."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(OWN, root / "spec")
    for mode in ("drop", "reweight"):
        spec = make_spec(estimators=[], further_training={"removal_mode": mode}, resources={"proof": False})
        run_here(spec, root / "spec", open_store(str(root / mode)))
    shutil.rmtree(root / "spec")
    return root


@pytest.fixture
def stores(made, tmp_path):
    """A copy of them, to be changed."""
    shutil.copytree(made, tmp_path / "stores")
    return tmp_path / "stores"


def test_two_sweeps_from_a_shell_need_their_stores_alone(stores, shell, monkeypatch):
    done = compare("drop/flowers", "reweight/flowers", "--to", "out/table.parquet", cwd=stores)
    assert done.returncode == 0, done.stderr
    assert "further_training.removal_mode: drop against reweight" in done.stdout
    assert "5 common removals, 7 common evaluation examples" in done.stdout
    for words in (
        "cosine, effects against",
        "cosine, effects centred",
        "spearman, effects",
        "joint ceiling",
        "normalised",
    ):
        assert words in done.stdout
    assert "4 seeds are common" in done.stderr
    table = pq.read_table(stores / "out" / "table.parquet")
    monkeypatch.chdir(stores)
    told = json.loads(shell("compare", "drop/flowers", "reweight/flowers", "--json").out)
    assert told["rows"] == table.to_pylist()
    assert told["differences"] == {"further_training.removal_mode": ["drop", "reweight"]}
    assert (told["complete"], told["exit_code"]) == (True, 0)
    paired = shell("compare", "drop/flowers", "reweight/flowers", "--pair", "3:10", "--pair", "6:6", "--json")
    assert {(r["step"], r["other_step"]) for r in json.loads(paired.out)["rows"]} == {(3, 10), (6, 6)}
    assert shell("compare", "drop/flowers", "reweight/flowers", "--to", "out/table.csv").code == 0
    assert (stores / "out" / "table.csv").read_text().startswith('"metric","adjust","step","other_step","score"')


def test_an_incomplete_sweep_exits_3_with_the_mend(stores):
    store = open_store(str(stores / "drop"))
    store.delete(next(e.key for e in store.list("flowers/parts/")))
    done = compare("drop/flowers", "reweight/flowers", cwd=stores)
    assert done.returncode == 3
    assert "18 of the 20 cells that are compared; `fimo resume" in done.stderr
    assert "joint ceiling" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["drop/flowers", "nowhere/flowers"], 2, "no sweep"),
        (["drop/flowers", "reweight/flowers", "--pair", "3"], 2, "--pair is STEP:STEP"),
        (["drop/flowers", "reweight/flowers", "--pair", "3:4"], 2, "second sweep recorded no step 4"),
        (["drop/flowers", "reweight/flowers", "--to", "table.xlsx"], 2, ".parquet or .csv"),
        (["drop/flowers", "reweight/flowers", "--to", "drop/flowers/sweep.json/x.csv"], 1, "cannot write"),
    ],
)
def test_a_mistake_is_one_line_and_the_contract_s_exit_code(stores, shell, monkeypatch, arguments, code, said):
    monkeypatch.chdir(stores)
    done = shell("compare", *arguments)
    lines = done.err.strip().splitlines()
    assert (done.code, len(lines)) == (code, 1), done.err
    assert said in lines[0]
