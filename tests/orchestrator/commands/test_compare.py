"""``fimo compare`` as a user types it, on sweeps in folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from fimo.orchestrator.store import open_store
from tests.support.small_sweep import make_spec, run_here

FIMO = [sys.executable, "-c", "from fimo.orchestrator.commands.main import main; main()"]


def compare(*arguments: object, cwd) -> subprocess.CompletedProcess[str]:
    command = [*FIMO, "compare", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=120, env=environment)


@pytest.fixture
def stores(beside, tmp_path):
    """``drop/flowers`` and ``reweight/flowers``, and nothing of the workload."""
    for mode in ("drop", "reweight"):
        spec = make_spec(estimators=[], further_training={"removal_mode": mode}, resources={"proof": False})
        run_here(spec, beside, open_store(str(tmp_path / mode)))
    for path in beside.iterdir():
        if path.is_file():
            path.unlink()
    return tmp_path


def test_two_sweeps_from_a_shell_need_their_stores_alone(stores):
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
    told = json.loads(compare("drop/flowers", "reweight/flowers", "--json", cwd=stores).stdout)
    assert told["rows"] == table.to_pylist()
    assert told["differences"] == {"further_training.removal_mode": ["drop", "reweight"]}
    assert (told["complete"], told["exit_code"]) == (True, 0)
    paired = compare("drop/flowers", "reweight/flowers", "--pair", "3:10", "--pair", "6:6", "--json", cwd=stores)
    assert {(r["step"], r["other_step"]) for r in json.loads(paired.stdout)["rows"]} == {(3, 10), (6, 6)}
    csv = compare("drop/flowers", "reweight/flowers", "--to", "out/table.csv", cwd=stores)
    assert csv.returncode == 0
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
def test_a_mistake_is_one_line_and_the_contract_s_exit_code(stores, arguments, code, said):
    done = compare(*arguments, cwd=stores)
    assert done.returncode == code
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert said in lines[0]
