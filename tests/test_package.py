"""What an installed user gets: the packages, their data, and nothing else at the top level."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from tests.conftest import LONG

ROOT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def folder(package: str) -> Path:
    """Where a package lies, by ``package-dir``."""
    mapped = SETUPTOOLS["package-dir"]
    nearest = max((name for name in mapped if f"{package}.".startswith(f"{name}.")), key=len)
    return ROOT / mapped[nearest] / Path(*package.removeprefix(nearest).strip(".").split("."))


def source_files() -> set[str]:
    """Every file of the package by its path in the wheel."""
    files = set()
    for name, mapped in SETUPTOOLS["package-dir"].items():
        for path in (ROOT / mapped).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                files.add((Path(*name.split(".")) / path.relative_to(ROOT / mapped)).as_posix())
    return files


def test_the_list_of_packages_is_the_packages_that_exist() -> None:
    exist = {
        ".".join([name, *init.parent.relative_to(ROOT / mapped).parts])
        for name, mapped in SETUPTOOLS["package-dir"].items()
        for init in (ROOT / mapped).rglob("__init__.py")
    }
    assert set(SETUPTOOLS["packages"]) == exist
    assert len(SETUPTOOLS["packages"]) == len(exist)
    for package in SETUPTOOLS["packages"]:
        assert (folder(package) / "__init__.py").is_file(), package


def test_a_wheel_holds_fimo_alone_with_its_data_and_types(tmp_path: Path) -> None:
    # From a copy, so that no build folder is left here or met from before.
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    for mapped in SETUPTOOLS["package-dir"].values():
        for path in (ROOT / mapped).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                target = copy / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    done = subprocess.run(
        [*command, "-w", str(tmp_path), str(copy)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    [info] = {name.split("/")[0] for name in names} - {"fimo"}
    assert info.startswith("fimo-")
    assert info.endswith(".dist-info")
    assert {name for name in names if name.startswith("fimo/")} == source_files()
    assert {"fimo/py.typed", "fimo/workers/workloads/data/concrete.safetensors"} <= source_files()


def test_what_is_left_out_of_the_quick_tests_exists() -> None:
    for begin in LONG:
        assert (ROOT / begin.partition("::")[0]).exists(), begin
