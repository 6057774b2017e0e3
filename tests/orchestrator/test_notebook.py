"""``import fimo``: light, and the whole of a sweep in a notebook's own process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import fimo
from fimo.orchestrator.run.written import read_table
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables import schemas
from fimo.workers import joined
from fimo.workers.errors import DivergedError, UsageError, WorkloadError
from tests.support.small_sweep import SPEC, make_spec, run_here

TABLES = tuple(schemas.SCHEMAS)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def test_import_is_fast_and_needs_neither_torch_nor_ray():
    code = (
        "import time; t = time.perf_counter(); import fimo; seconds = time.perf_counter() - t; import sys; "
        "print(seconds, *[m for m in ('torch', 'ray', 'numpy', 'pyarrow', 'boto3') if m in sys.modules])"
    )
    best = min((python(code).split() for _ in range(3)), key=lambda words: float(words[0]))
    assert float(best[0]) < 0.3
    assert best[1:] == []


def test_a_spec_is_read_and_help_is_given_without_torch_or_ray():
    code = (
        "import sys, fimo; fimo.load_spec; from fimo.orchestrator.commands import main; "
        "print(*[m for m in ('torch', 'ray') if m in sys.modules])"
    )
    assert python(code).split() == []


@pytest.fixture
def path(beside: Path) -> Path:
    path = beside / "spec.yaml"
    path.write_text(yaml.safe_dump(SPEC))
    return path


def test_a_sweep_runs_and_is_read_in_this_process(path, tmp_path):
    ray_before = "ray" in sys.modules
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        sweep = fimo.run(path, tmp_path / "store")
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert ("ray" in sys.modules) == ray_before
    assert sweep.status()["complete"]
    assert sweep.uri == f"{tmp_path}/store/flowers"
    _, store, _ = run_here(make_spec(), path.parent)
    for name in TABLES[:-1]:
        opened = getattr(fimo.open_sweep(sweep.uri), name)()
        assert opened.num_rows > 0
        assert opened.equals(read_table(Sweep(store, "flowers"), name)), name
    assert set(sweep.costs()["what"].to_pylist()) == {"shard", "estimator"}


def test_a_spec_read_before_runs_with_the_folder_that_it_is_given(path, tmp_path, monkeypatch):
    spec = fimo.load_spec(path)
    assert spec.name == "flowers"
    with pytest.raises(UsageError, match="not found"):
        fimo.run(spec.model_copy(update={"workload": "elsewhere:flowers"}), tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    assert fimo.run(spec, "store", beside=path.parent).status()["complete"]


def test_tables_are_reduced_anew_if_parts_are_not_what_they_were_made_from(path, tmp_path):
    sweep = fimo.run(path, tmp_path / "store")
    whole = sweep.attribution()
    part = next((tmp_path / "store" / "flowers" / "parts").rglob("*.parquet"))
    part.unlink()
    assert not fimo.open_sweep(sweep.uri).attribution().equals(whole)
    assert sweep.attribution().equals(whole), "what was read is kept"


def test_tables_are_of_one_state_of_a_sweep_that_goes_on(beside, tmp_path):
    """Removals in another order have other numbers: an effect must not get the name of another example."""
    sweep = fimo.run(make_spec(), tmp_path, beside=beside)
    before, costs = sweep.attribution(), sweep.costs()
    grown = make_spec(removals={"indices": [22, 11, 0, 3, 5]}, seeds=6)
    fimo.run(grown, tmp_path, beside=beside)
    assert sweep.attribution().equals(before), "what was read is kept"
    assert sweep.top(2) == fimo.open_sweep(sweep.uri).top(2)
    assert set(sweep.attribution()["seeds"].to_pylist()) == {6}
    assert sweep.costs().num_rows > costs.num_rows


def test_what_is_no_sweep_is_told(tmp_path):
    with pytest.raises(UsageError, match="no sweep"):
        fimo.open_sweep(tmp_path / "none").scores()
    with pytest.raises(UsageError, match="cannot be read"):
        fimo.load_spec(tmp_path / "none.yaml")


def test_what_a_reader_must_know_is_warned_of_and_a_sweep_that_fails_throughout_raises(beside, tmp_path, monkeypatch):
    diverging = make_spec(further_training={"optimizer": {"name": "sgd", "lr": 1e38, "momentum": 0.9}})
    with pytest.warns(UserWarning, match="results are not finite"):
        fimo.run(diverging, tmp_path / "one", beside)
    with pytest.raises(DivergedError, match="nan at the final model"):
        fimo.run(make_spec(workload="flowers:nan_loss", estimators=[]), tmp_path / "two", beside)

    def fails(*_args, **_options):
        raise WorkloadError("the disk is on fire")

    monkeypatch.setattr(joined, "run_shard", fails)
    with pytest.raises(WorkloadError, match=r"every shard fails.*on fire"):
        fimo.run(make_spec(estimators=[]), tmp_path / "three", beside)
