"""What a result depends on, as digests: the keys of a sweep's parts hold these and nothing else.

Two sweeps with equal digests have equal deltas, whatever their numbers of seeds, removals, estimators or replicas;
a change of anything that moves a delta (data, θᶠ, the workload's code, the further-training section) gives another.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fimo.orchestrator.spec.spec import FurtherTraining
from fimo.workers.errors import UsageError
from fimo.workers.examples import Examples
from fimo.workers.workload import find_module
from torch import Tensor
from torch.utils import _pytree as pytree

SCHEMA_VERSION = 1


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, floats by their shortest exact form."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 (hex) of canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def tensors_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 (hex) of tensors by name, dtype, shape and bytes."""
    sha = hashlib.sha256()
    for name, tensor in named:
        t = tensor.detach().to("cpu").contiguous()
        sha.update(f"{name}:{t.dtype}:{tuple(t.shape)};".encode())
        sha.update(t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return sha.hexdigest()


def examples_digest(examples: Examples, block: int = 256) -> str:
    """SHA-256 (hex) of examples as the workload hands them out, before any cast."""
    if examples.tensors is not None:
        return tensors_digest(sorted(examples.tensors.items()))
    sha = hashlib.sha256(f"{len(examples)};".encode())
    for start in range(0, len(examples), block):
        # One example at a time: what a dataset gives an example must not depend on its neighbours.
        for index in range(start, min(start + block, len(examples))):
            leaves, tree = pytree.tree_flatten(examples.batch([index]))
            sha.update(str(tree).encode())
            for place, leaf in enumerate(leaves):
                sha.update(
                    tensors_digest([(str(place), leaf)]).encode() if isinstance(leaf, Tensor) else repr(leaf).encode()
                )
    return sha.hexdigest()


def source_digest(reference: str, beside: Path) -> str:
    """SHA-256 (hex) of the workload's code: its module and the modules beside the spec that it imports.

    Code is compared as parsed, so comments, docstrings and layout do not count. The modules are read, not run.

    Raises:
        UsageError: a module is not Python.
    """
    found = local_modules(reference, beside)
    return digest({name: _parsed(found[name]) for name in sorted(found)})


def local_modules(reference: str, beside: Path) -> dict[str, Path]:
    """Module name -> file of the workload's module and of every module in ``beside`` that it imports, in turn.

    The workload's own module may be an installed one; everything else named here is in ``beside``. Found by reading
    the import statements: what is imported by a name made at run time is not seen.

    Raises:
        UsageError: a module is not Python.
    """
    module, _, path = find_module(reference, beside)
    found: dict[str, Path] = {}
    if path is None:
        path = _installed(module)
    else:
        _collect_packages(module, beside, found)
    if path is not None:
        _collect(module, path, beside, found)
    return found


def _installed(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


def _collect(module: str, path: Path, beside: Path, found: dict[str, Path]) -> None:
    found[module] = path
    # In a package's own __init__ one dot is the package itself; in its modules it is their parent.
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
            _collect_packages(name, beside, found)
            _collect_local(name, beside, found)


def _collect_packages(module: str, beside: Path, found: dict[str, Path]) -> None:
    """Importing ``a.b.c`` runs ``a`` and ``a.b`` first."""
    packages = module.split(".")[:-1]
    for depth in range(1, len(packages) + 1):
        _collect_local(".".join(packages[:depth]), beside, found)


def _collect_local(module: str, beside: Path, found: dict[str, Path]) -> None:
    if module and module not in found:
        _, _, local = find_module(f"{module}:x", beside)
        if local is not None:
            _collect(module, local, beside, found)


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


def result_digest(
    *,
    workload: str,
    workload_args: Mapping[str, Any],
    source: str,
    train: str,
    evals: str,
    final_model: str,
    further_training: Mapping[str, Any] | None,
) -> str:
    """The digest in the keys of parts (and, without ``further_training``, of the estimates that do not follow it)."""
    return digest(
        {
            "schema": SCHEMA_VERSION,
            "workload": workload,
            "workload_args": dict(workload_args),
            "source": source,
            "train": train,
            "evals": evals,
            "final_model": final_model,
            "further_training": further_training,
        }
    )


def training_identity(section: FurtherTraining) -> dict[str, Any]:
    """The further-training section as it counts for a result: every value, defaults written out."""
    return section.model_dump(mode="json")


def rows_digest(columns: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """SHA-256 (hex) of a table's values, column by column; provenance is not part of it."""
    sha = hashlib.sha256()
    for name in sorted(columns):
        values = np.ascontiguousarray(columns[name])
        sha.update(f"{name}:{values.dtype.str}:{values.shape};".encode())
        sha.update(values.tobytes())
    return sha.hexdigest()
