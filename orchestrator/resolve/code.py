"""The workload's code: which files it is, its digest, and its copy for machines that have not got it.

Modules of ``fimo.workers.workloads`` that it imports are its code too: how they prepare data moves numbers. The rest of
fimo is not: its version is told apart by provenance.

The modules are read, never run: a store must not choose what code runs here. What is imported by a name made at run
time is not seen.
"""

from __future__ import annotations

import ast
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from fimo.orchestrator.spec.canonical import digest
from fimo.workers import workloads
from fimo.workers.errors import UsageError
from fimo.workers.workload import file_beside, find_installed, find_module

_SHIPPED = f"{workloads.__name__}."


def source_digest(reference: str, beside: Path) -> str:
    """SHA-256 (hex) of the workload's code: its module, and the modules beside the spec and shipped that it imports.

    Code is compared as parsed, so comments, docstrings and layout do not count. The modules are read, not run.

    Raises:
        UsageError: a module is not Python.
    """
    modules = local_modules(reference, beside)
    return digest({name: _parsed(modules[name]) for name in sorted(modules)})


def local_modules(reference: str, beside: Path) -> dict[str, Path]:
    """Module name -> file of the workload's module and of every module that it imports, in turn.

    The workload's own module may be an installed one; everything else named here is in ``beside`` or in
    ``fimo.workers.workloads``. Found by reading the import statements: what is imported by a name made at run time is
    not seen.

    Raises:
        UsageError: a module is not Python.
    """
    module, _, path = find_module(reference, beside)
    modules: dict[str, Path] = {}
    if module.startswith(_SHIPPED):
        # What lies beside the spec is no part of a shipped workload.
        beside = beside / "nothing"
    if path is None:
        path = _installed(module)
    else:
        _collect_packages(module, beside, modules)
    if path is not None:
        _collect(module, path, beside, modules)
    return modules


def _installed(module: str) -> Path | None:
    found = find_installed(module)
    return Path(found.origin) if found is not None and found.origin and found.origin.endswith(".py") else None


def _shipped(module: str) -> Path | None:
    """A shipped module's file, found without importing it."""
    path = Path(str(workloads.__file__)).with_name(module.removeprefix(_SHIPPED) + ".py")
    return path if path.is_file() else None


def _collect(module: str, path: Path, beside: Path, modules: dict[str, Path]) -> None:
    modules[module] = path
    # One dot means the package itself in its __init__, and the package around it in a module.
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(_tree(path)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - (node.level - 1)] if node.level else []
            root = ".".join([*above, *([node.module] if node.module else [])])
            names = [root, *(f"{root}.{alias.name}" if root else alias.name for alias in node.names)]
        for name in names:
            _collect_packages(name, beside, modules)
            _collect_local(name, beside, modules)


def _collect_packages(module: str, beside: Path, modules: dict[str, Path]) -> None:
    """Importing ``a.b.c`` runs ``a`` and ``a.b`` first."""
    packages = module.split(".")[:-1]
    for depth in range(1, len(packages) + 1):
        _collect_local(".".join(packages[:depth]), beside, modules)


def _collect_local(module: str, beside: Path, modules: dict[str, Path]) -> None:
    if module and module not in modules:
        local = file_beside(module, beside)
        if local is None and module.startswith(_SHIPPED):
            local = _shipped(module)
        if local is not None:
            _collect(module, local, beside, modules)


def _tree(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"workload module {path.name} is not valid Python: {error}") from error


def _parsed(path: Path) -> str:
    tree = _tree(path)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


@dataclass(frozen=True)
class Staged:
    """A file that goes up: where it lies here, its path in the working directory there, its size in bytes."""

    source: Path
    target: str
    size: int


def code_files(reference: str, beside: Path) -> list[Staged]:
    """The workload's module and the local modules that it imports; none if it is an installed one.

    Raises:
        UsageError: a module is not Python, or lies outside the spec's folder.
    """
    if find_module(reference, beside)[2] is None:
        return []
    files = [path for name, path in local_modules(reference, beside).items() if not name.startswith(_SHIPPED)]
    return [Staged(path, path.relative_to(beside).as_posix(), path.stat().st_size) for path in sorted(files)]


def write_files(files: list[Staged], folder: Path) -> None:
    """Copy files into a folder, under their targets."""
    for file in files:
        target = folder / file.target
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file.source, target)
