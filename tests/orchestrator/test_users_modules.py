"""A user's own ``workers/``, ``estimators/`` and ``orchestrator.py`` beside a spec are the user's, wherever it runs."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from fimo.orchestrator.cluster import staging
from fimo.orchestrator.spec.spec import parse
from fimo.orchestrator.store import open_store
from tests.support.small_sweep import OWN, SPEC, run_here, table_bytes

FILES = {
    "workers/__init__.py": "NAME = 'mine'\n",
    "workers/net.py": (OWN / "flowers.py").read_text(),
    "estimators/targets.py": "SCALE = 1.0\n",
    "orchestrator.py": (
        "import workers\n"
        "from estimators.targets import SCALE\n"
        "from workers.net import flowers\n"
        "assert workers.NAME == 'mine'\n"
        "def make():\n"
        "    return flowers()\n"
    ),
}
VALUES = {**SPEC, "workload": "orchestrator:make", "seeds": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "spec.yaml").write_text(yaml.safe_dump(VALUES))
    return folder


@pytest.fixture(autouse=True)
def _as_installed(monkeypatch):
    """As installed: of this repository's own folders, ``fimo`` alone can be imported."""
    root = Path(__file__).parents[2]
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry or ".").resolve() != root])
    before = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] in ("workers", "estimators", "orchestrator"):
            del sys.modules[name]


def test_they_run_in_this_process(folder):
    report, store, _ = run_here(parse(VALUES), folder)
    assert report.exit_code == 0
    # The same workload under another name gives the same numbers.
    _, plain, _ = run_here(parse({**VALUES, "workload": "workers.net:flowers"}), folder)
    # All but what a table says in its metadata that it is of.
    one, other = (
        {key: pq.read_table(io.BytesIO(data)) for key, data in table_bytes(of).items()} for of in (store, plain)
    )
    assert one == other


@pytest.mark.ray
@pytest.mark.parametrize("where", [pytest.param("beside", marks=pytest.mark.slow), "elsewhere"])
def test_they_run_on_an_embedded_ray(folder, tmp_path, where):
    command = [sys.executable, "-c", "from fimo.orchestrator.commands.main import main; main()", "run"]
    done = subprocess.run(
        [*command, str(folder / "spec.yaml"), "--store", str(tmp_path / "store")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=folder if where == "beside" else tmp_path,
    )
    assert done.returncode == 0, done.stderr
    _, here, _ = run_here(parse(VALUES), folder)
    assert table_bytes(open_store(str(tmp_path / "store"))) == table_bytes(here)


def test_they_go_up_with_a_job(folder):
    _, files, _ = staging.job_files(parse(VALUES), folder)
    assert [file.target for file in files] == sorted(FILES)
