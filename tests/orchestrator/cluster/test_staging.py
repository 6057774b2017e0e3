"""What goes up with a job: the code that the workload imports and the files that the spec names, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from fimo.orchestrator.cluster import staging
from fimo.orchestrator.resolve.code import code_files, local_modules, source_digest
from fimo.orchestrator.spec.spec import Spec, parse, read
from fimo.workers.errors import UsageError
from tests.faults import sweeps


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A workload in a package, with relative imports, and much beside it that it does not import."""
    folder = tmp_path / "project"
    files = {
        "pkg/__init__.py": "from . import shared\n",
        "pkg/shared.py": "import constants\n",
        "pkg/sub/__init__.py": "",
        "pkg/sub/mine.py": "from ..other import thing\nimport torch\n",
        "pkg/other.py": "def thing(): pass\n",
        "pkg/unused.py": "",
        "constants.py": "X = 1\n",
        "unrelated.py": "",
        ".git/config": "",
        "data/train.csv": "",
        ".venv/lib/x.py": "",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def spec(**changes: object) -> Spec:
    values = read(sweeps.SPEC % (3, 1)).canonical()
    return parse(values | {"workload": "pkg.sub.mine:make"} | changes)


CODE = ["constants.py", "pkg/__init__.py", "pkg/other.py", "pkg/shared.py", "pkg/sub/__init__.py", "pkg/sub/mine.py"]


def test_packages_relative_imports_and_what_they_import_go_up(folder: Path) -> None:
    same, files, renamed = staging.job_files(spec(), folder)
    assert [f.target for f in files] == CODE
    assert (same, renamed) == (spec(), {})
    assert set(local_modules("pkg.sub.mine:make", folder)) == {
        "constants",
        "pkg",
        "pkg.other",
        "pkg.shared",
        "pkg.sub",
        "pkg.sub.mine",
    }


@pytest.mark.parametrize("name", CODE)
def test_a_change_of_any_of_them_changes_the_digest(folder: Path, name: str) -> None:
    before = source_digest("pkg.sub.mine:make", folder)
    (folder / "unrelated.py").write_text("Y = 1\n")
    assert source_digest("pkg.sub.mine:make", folder) == before
    with (folder / name).open("a") as file:
        file.write("\nZ = 2\n")
    assert source_digest("pkg.sub.mine:make", folder) != before


def test_an_installed_workload_takes_nothing_along(folder: Path) -> None:
    assert code_files("fimo.workers.workloads.tabular:concrete", folder) == []


def test_files_that_the_spec_names_go_up_under_names_that_hold_there(folder: Path, tmp_path: Path) -> None:
    (folder / "models").mkdir()
    (folder / "models/final.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "chosen.txt").write_text("1\n2\n")
    given = spec(final_model="models/final.safetensors", removals={"from": "../chosen.txt"})
    there, files, renamed = staging.job_files(given, folder)
    assert there.final_model == "models/final.safetensors"
    assert there.removals.file == "outside/removals/chosen.txt"
    assert renamed == {"outside/removals/chosen.txt": "../chosen.txt"}
    staging.write_job(files, tmp_path / "job", there)
    assert (tmp_path / "job/outside/removals/chosen.txt").read_text() == "1\n2\n"
    assert (tmp_path / "job/models/final.safetensors").read_bytes() == b"x" * 10
    assert read((tmp_path / "job/spec.yaml").read_text()) == there


def test_a_final_model_in_the_store_stays_there(folder: Path) -> None:
    there, files, _ = staging.job_files(spec(final_model="s3://bucket/final.safetensors"), folder)
    assert there.final_model == "s3://bucket/final.safetensors"
    assert [f.target for f in files] == CODE


def test_too_large_a_final_model_is_told_with_its_size(folder: Path) -> None:
    with open(folder / "final.safetensors", "wb") as file:
        file.truncate(300 * 2**20)
    with pytest.raises(UsageError, match=r"300 MiB.*put it in the store"):
        staging.job_files(spec(final_model="final.safetensors"), folder)


def test_a_missing_file_is_told(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"final_model: 'nowhere\.safetensors' is no file beside the spec"):
        staging.job_files(spec(final_model="nowhere.safetensors"), folder)
