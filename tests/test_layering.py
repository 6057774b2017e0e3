"""Imports point one way: rooms, and the few modules that may import Ray, S3, or more than torch.

Every import statement counts, those inside functions too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("orchestrator", "workers", "estimators")

ROOMS: dict[str, set[str]] = {
    "spec": set(),
    "starters": set(),
    "store": set(),
    "sweep": {"spec", "store"},
    "tables": {"sweep", "spec", "store"},
    "resolve": {"sweep", "spec", "store"},
    "run": {"tables", "resolve", "sweep", "spec", "store"},
    "search": {"run", "tables", "resolve", "sweep", "spec", "store"},
    "report": {"search", "run", "tables", "resolve", "sweep", "spec", "store"},
    "cluster": {"run", "tables", "resolve", "sweep", "spec", "store"},
    "commands": {"starters", "cluster", "report", "search", "run", "tables", "resolve", "sweep", "spec", "store"},
    "notebook": {"report", "search", "run", "tables", "resolve", "sweep", "spec", "store"},
}
"""Room of the orchestrator -> the rooms that it may import."""

ALLOWED = {"torch", "numpy", "safetensors"}
"""What ``workers`` and ``estimators`` need beside the standard library and fimo."""

OPTIONAL = {"pandas", "openpyxl", "folktables", "transformers", "huggingface_hub", "pyarrow"}
"""What shipped workloads may import besides, inside functions alone: extras of pyproject.toml."""


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Dotted names of everything that a module imports; ``from a.b import c`` gives ``a.b.c`` too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are written out in full, which this test relies on"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_at_once(path: Path) -> Iterator[str]:
    """Of ``imported``, what is imported with the module itself, outside of functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if node not in inside and isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif node not in inside and isinstance(node, ast.ImportFrom):
            yield node.module or ""


def rooms(path: Path) -> set[str]:
    """The orchestrator's rooms that a module imports."""
    names = (name.split(".") for name in imported(path))
    return {name[2] for name in names if name[:2] == ["fimo", "orchestrator"] and len(name) > 2}


def importers(*packages: str) -> set[str]:
    """The modules of fimo that import any of the packages."""
    paths = [path for folder in (*PACKAGES, "fimo") for path in modules(folder)]
    return {
        str(path.relative_to(ROOT)) for path in paths if any(name.split(".")[0] in packages for name in imported(path))
    }


def test_every_room_is_known() -> None:
    paths = (path.relative_to(ROOT / "orchestrator") for path in modules("orchestrator"))
    folders = {path.parts[0] for path in paths if len(path.parts) > 1}
    assert folders | {"notebook"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_the_rooms_below_them(room: str) -> None:
    paths = [ROOT / "orchestrator" / "notebook.py"] if room == "notebook" else modules(f"orchestrator/{room}")
    for path in paths:
        assert rooms(path) <= ROOMS[room] | {room}, path


def test_ray_is_imported_where_tasks_are_scheduled_and_where_jobs_are_submitted_and_nowhere_else() -> None:
    assert importers("ray") == {
        "orchestrator/run/connect.py",
        "orchestrator/run/entry.py",
        "orchestrator/run/nodes.py",
        "orchestrator/run/pool.py",
        "orchestrator/search/tune.py",
        "orchestrator/cluster/head.py",
    }


def test_s3_is_imported_where_objects_are_stored_and_nowhere_else() -> None:
    assert importers("boto3", "botocore", "s3transfer") == {"orchestrator/store/s3.py"}


@pytest.mark.parametrize("package", ["workers", "estimators"])
def test_workers_and_estimators_need_torch_numpy_and_safetensors_alone(package: str) -> None:
    for path in modules(package):
        foreign = {name.split(".")[0] for name in imported(path)} - ALLOWED - set(sys.stdlib_module_names) - {"fimo"}
        if path.parent == ROOT / "workers" / "workloads":
            foreign -= OPTIONAL
            assert not {name.split(".")[0] for name in imported_at_once(path)} & OPTIONAL, path
        if path == ROOT / "workers" / "trainable.py":
            assert "peft" not in imported_at_once(path)
            foreign -= {"peft"}
        assert not foreign, path


@pytest.mark.parametrize(
    ("package", "never"), [("workers", ("orchestrator", "estimators")), ("estimators", ("orchestrator",))]
)
def test_nothing_points_back(package: str, never: tuple[str, ...]) -> None:
    for path in modules(package):
        for name in imported(path):
            assert not any(name == f"fimo.{other}" or name.startswith(f"fimo.{other}.") for other in never), path


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next and the last the first; empty if there are none."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return way[way.index(name) :]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if circle := visit(other, [*way, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(graph) if (circle := visit(name, []))), [])


def test_no_modules_import_each_other_in_a_circle() -> None:
    paths = {
        ".".join(["fimo", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
        for folder in PACKAGES
        for path in modules(folder)
    }
    graph = {name: {i for i in imported(path) if i in paths and i != name} for name, path in paths.items()}
    assert cycle(graph) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_installed(package: str) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for folder in {path.parent for path in modules(package)}:
        assert f'"fimo.{".".join(folder.relative_to(ROOT).parts)}"' in text, folder
