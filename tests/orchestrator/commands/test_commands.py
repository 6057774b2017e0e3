"""``fimo`` as a user types it: real processes, an embedded Ray, a store in a folder."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from fimo.orchestrator.store import open_store
from tests.support.small_sweep import SPEC, make_spec, run_here, table_bytes

pytestmark = pytest.mark.ray

FIMO = [sys.executable, "-c", "from fimo.orchestrator.commands.main import main; main()"]
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}


def fimo(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    command = [*FIMO, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, check=False, **options)


@pytest.fixture
def spec(beside: Path) -> Path:
    path = beside / "spec.yaml"
    path.write_text(yaml.safe_dump(SPEC))
    return path


@pytest.mark.usefixtures("traced")
def test_a_sweep_from_a_shell_ends_as_it_does_in_process(beside, shell, tmp_path):
    """The runs are real processes; what looks at them is called here, as everywhere."""
    spec = beside / "spec.yaml"
    spec.write_text(yaml.safe_dump(SPEC))
    planned = shell("plan", spec, "--json")
    assert planned.code == 0
    assert json.loads(planned.out)["cells"] == 20

    done = fimo("run", spec, "--store", tmp_path / "store")
    assert done.returncode == 0, done.stderr
    assert "grad_cos" in done.stdout
    assert "attribution.parquet" in done.stdout
    assert "20 of 20 cells" in done.stderr

    again = fimo("run", spec, "--store", tmp_path / "store", "--json")
    report = json.loads(again.stdout)
    assert (report["complete"], report["computed"], report["exit_code"]) == (True, 0, 0)

    status = shell("status", tmp_path / "store" / "flowers", "--json")
    told = json.loads(status.out)
    assert (status.code, told["done"], told["missing"], told["seeds_complete"]) == (0, 20, 0, 4)

    # Two Ray workers here, one process there: the same bytes.
    _, here, _ = run_here(make_spec(), spec.parent)
    assert table_bytes(open_store(str(tmp_path / "store"))) == table_bytes(here)

    pulled = shell("pull", tmp_path / "store" / "flowers", "--to", tmp_path / "pulled")
    assert pulled.code == 0
    assert (tmp_path / "pulled" / "attribution.parquet").read_bytes() == table_bytes(here)[
        "flowers/tables/attribution.parquet"
    ]
    csv = shell("pull", tmp_path / "store" / "flowers", "--to", tmp_path / "csv", "--format", "csv")
    assert csv.code == 0
    assert (tmp_path / "csv" / "scores.csv").read_text().startswith('"estimator","params","metric","adjust"')
    assert {p.stem for p in (tmp_path / "csv").iterdir()} == {p.stem for p in (tmp_path / "pulled").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(3))
def test_kill_9_at_a_random_moment_then_resume_gives_the_bytes_of_an_undisturbed_run(spec, tmp_path, moment):
    values = {**SPEC, "seeds": 30}
    spec.write_text(yaml.safe_dump(values))
    store = tmp_path / "store"
    process = subprocess.Popen(
        [*FIMO, "run", str(spec), "--store", str(store)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wanted = random.Random(moment).randrange(1, 60)
    opened = open_store(str(store))
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if sum(1 for _ in opened.list("flowers/parts/")) >= wanted:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(2)
    committed = {e.key: opened.get(e.key) for e in opened.list("flowers/parts/")}

    pulled = fimo("pull", store / "flowers", "--to", tmp_path / "early")
    assert pulled.returncode == (3 if len(committed) < 90 else 0)
    shutil.move(spec, tmp_path / "spec-is-not-needed.yaml")
    resumed = fimo("resume", store / "flowers", "--json", "--code", spec.parent)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["complete"]
    assert all(opened.get(key) == data for key, data in committed.items()), "what was committed is not touched"
    _, here, _ = run_here(make_spec(seeds=30), spec.parent)
    assert table_bytes(opened) == table_bytes(here)


def test_sigterm_ends_a_run_in_good_order(spec, tmp_path):
    spec.write_text(yaml.safe_dump({**SPEC, "seeds": 400}))
    process = subprocess.Popen(
        [*FIMO, "run", str(spec), "--store", str(tmp_path / "store")],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    opened = open_store(str(tmp_path / "store"))
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not any(opened.list("flowers/parts/")):
        time.sleep(0.05)
    process.terminate()
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "stopped by SIGTERM" in talk
    assert "fimo resume" in talk
    status = fimo("status", tmp_path / "store" / "flowers")
    assert status.returncode == 3


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["plan", "missing.yaml"], 2, "cannot be read"),
        (["run", "spec.yaml", "--store", "ftp://x/y"], 2, "ftp"),
        (["status", "nowhere/none"], 2, "no sweep"),
        (["resume", "nowhere/none"], 2, "no sweep"),
        (["pull", "nowhere/none", "--to", "x"], 2, "no sweep"),
        (["plan", "broken.yaml"], 2, "unknown key 'epoch'"),
        (["run", "spec.yaml", "--store", "spec.yaml"], 1, "spec.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_the_contract_s_exit_code(spec, shell, monkeypatch, arguments, code, said):
    (spec.parent / "broken.yaml").write_text("epoch: 3")
    monkeypatch.chdir(spec.parent)
    done = shell(*arguments)
    lines = done.err.strip().splitlines()
    assert (done.code, len(lines), done.out) == (code, 1, ""), done.err
    assert said in lines[0]


def test_a_mistake_is_no_traceback_in_a_process_of_its_own(spec):
    done = fimo("plan", "missing.yaml", cwd=spec.parent)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fimo: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_resume_runs_no_code_that_is_not_what_the_sweep_was_started_with(spec, tmp_path):
    run_here(make_spec(), spec.parent, open_store(str(tmp_path / "store")))
    made = tmp_path / "made"
    (spec.parent / "flowers.py").write_text(f"open({str(made)!r}, 'w').write('ran')\n")
    resumed = fimo("resume", tmp_path / "store" / "flowers", cwd=spec.parent)
    assert resumed.returncode == 2
    assert "as it was when the sweep was started" in resumed.stderr
    assert not made.exists()


def test_pull_reduces_anew_when_parts_have_come_since(spec, tmp_path):
    store = open_store(str(tmp_path / "store"))
    run_here(make_spec(), spec.parent, store)
    key = next(e.key for e in store.list("flowers/parts/"))
    store.delete(key)
    pulled = fimo("pull", tmp_path / "store" / "flowers", "--to", tmp_path / "pulled")
    assert pulled.returncode == 3
    assert "incomplete" in pulled.stderr
    seeds = pq.read_table(tmp_path / "pulled" / "attribution.parquet")["seeds"].to_pylist()
    assert set(seeds) == {3, 4}
