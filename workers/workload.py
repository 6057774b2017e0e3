"""The workload contract: what a user writes to bring a model.

Does not train, schedule or read a store. A workload module is the user's code and is run as such; everything
else that fimo reads (specs, parts, tables, final models) is data alone.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from fimo.workers.errors import FimoError, UsageError, WorkloadError, in_a_line, nearest
from fimo.workers.examples import Batch, Dataset

SHIPPED = "fimo.workers.workloads."
"""Modules of fimo that a spec may name start so."""
_OURS = ("fimo", "fimo.workers.workload")
"""Modules that ``Workload`` is imported from."""


@dataclass(frozen=True)
class Workload:
    """A model architecture with its data and its per-example loss and measure.

    Attributes:
        model: any torch module, carrying the final model's parameters unless the spec names a file. On torch's meta
            device it is an architecture alone, and is refused without a file.
        train: training examples 𝒟: a mapping of equally long tensors, or a map-style dataset.
        evals: evaluation examples z, the same kinds.
        outputs: ``outputs(model, batch) -> Tensor (B, …)``.
        loss: ``loss(outputs, batch) -> Tensor (B,)``, unreduced: the per-example training loss ℓ_i.
        measure: ``measure(outputs, batch) -> Tensor (B,)``, the evaluation function g; default the loss.
        collate: for datasets, list of items -> batch; default the dataset's own ``collate``.
        padding: of examples kept as tensors, the name of the tensor (n, tokens) that is 0 where there is padding:
            batches are then cut to their longest example, if that is seen to change nothing.
        ids, labels: of each training example, what leads back to the user's own row: a key, and a text for people.
            They stand in tables, and no number depends on them.
        render: shows one example, training or evaluation, as ``train[i]`` (of a mapping, that of each tensor), to the
            reader of a report: a text, a mapping (the row of a table, what it has under ``text`` in full), or an image
            (H, W), (H, W, 3) or (3, H, W).
    """

    model: nn.Module
    train: Mapping[str, Tensor] | Dataset
    evals: Mapping[str, Tensor] | Dataset
    outputs: Callable[[nn.Module, Batch], Tensor]
    loss: Callable[[Tensor, Batch], Tensor]
    measure: Callable[[Tensor, Batch], Tensor] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    padding: str | None = "attention_mask"
    ids: Sequence[Any] | None = None
    labels: Sequence[Any] | None = None
    render: Callable[[Any], Any] | None = None


def find_module(reference: str, beside: Path) -> tuple[str, str, Path | None]:
    """Split ``module:function`` and find the module's file beside the spec, if it is there.

    Returns:
        (module, function, path), path None if the module is an installed one (such as
        ``fimo.workers.workloads.tabular``).

    Raises:
        UsageError: the reference is not of the form ``module:function``.
    """
    module, separator, function = reference.partition(":")
    names = module.split(".")
    if not separator or not all(name.isidentifier() for name in (*names, function)):
        raise UsageError(f"workload '{reference}' is not of the form module:function")
    if any(name.startswith("__") for name in (*names, function)):
        raise UsageError(f"workload '{reference}' names what is Python's own: name a function that makes a Workload")
    return module, function, file_beside(module, beside)


def file_beside(module: str, beside: Path) -> Path | None:
    """A module's file in a folder, if it is there; fimo's own modules are never looked for there."""
    names = module.split(".")
    if names[0] == "fimo":
        return None
    stem = beside.joinpath(*names)
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


def find_installed(module: str) -> ModuleSpec | None:
    """An installed module, found without running any of it nor of the packages that it is in; None if there is none."""
    found, locations = None, None
    names = module.split(".")
    for depth in range(1, len(names) + 1):
        if depth > 1 and locations is None:
            return None
        found = _look_for(".".join(names[:depth]), locations)
        if found is None:
            return None
        locations = found.submodule_search_locations
    return found


def _look_for(name: str, locations: Any) -> ModuleSpec | None:
    for finder in sys.meta_path:
        try:
            found = finder.find_spec(name, locations)
        except (ImportError, AttributeError, ValueError):
            continue
        if found is not None:
            return found
    return None


def _import(module: str, path: Path | None, beside: Path) -> ModuleType:
    if path is not None:
        if module.partition(".")[0] in sys.stdlib_module_names:
            raise UsageError(f"'{path.name}' has the name of a module of Python's own, which it would hide: rename it")
        loaded = sys.modules.get(module)
        if loaded is not None and Path(getattr(loaded, "__file__", None) or "").resolve() != path.resolve():
            del sys.modules[module]
        # Move it to the front even if it is there already: another spec's folder may have come before it since.
        sys.path[:] = [str(beside), *(entry for entry in sys.path if entry != str(beside))]
        importlib.invalidate_caches()
    return importlib.import_module(module)


def load_workload(
    reference: str, arguments: Mapping[str, Any], beside: Path, elsewhere: Path | None = None
) -> Workload:
    """Import ``module:function``, from ``beside`` if the module is there, and call the function.

    An argument that the function annotates as ``Path`` is given as one: of the file in ``beside`` if there is one, else
    in ``elsewhere``, else as it stands, which is relative to the working directory.

    Raises:
        UsageError: no such module or function, or arguments that it does not take.
        WorkloadError: the function raised, or returned something else than a Workload.
    """
    module, function, path = find_module(reference, beside)
    if path is None:
        _refuse_foreign(module, function)
    try:
        loaded = _import(module, path, beside)
    except UsageError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            raise UsageError(f"workload module '{module}' not found beside the spec or installed") from error
        raise WorkloadError(f"workload module '{module}' needs '{error.name}', which is not installed") from error
    except Exception as error:
        raise WorkloadError(f"workload module '{module}' failed to import: {in_a_line(error)}") from error
    make = getattr(loaded, function, None)
    if not callable(make):
        names = [n for n, v in vars(loaded).items() if callable(v) and not n.startswith("_")]
        raise UsageError(f"workload module '{module}' has no function '{function}'{nearest(function, names)}")
    if path is None and not _makes_workloads(make, function):
        raise UsageError(
            f"'{reference}' is installed and no workload: a public function is one if it is annotated '-> Workload'"
        )
    _refuse_arguments(reference, make, arguments)
    try:
        workload = make(**_with_paths(make, arguments, [beside, *([elsewhere] if elsewhere else [])]))
    except FimoError:
        raise  # It is one line already.
    except Exception as error:
        raise WorkloadError(f"workload {reference} failed: {in_a_line(error)}{_meant(error)}") from error
    if not isinstance(workload, Workload):
        raise WorkloadError(
            f"workload {reference} returned {type(workload).__name__}, not a fimo.workers.workload.Workload"
        )
    return workload


def _refuse_foreign(module: str, function: str) -> None:
    """An installed function must say that it makes a workload: a spec from a stranger must not call ``subprocess:run``.

    The module is read and not run: to import one runs what stands in it.
    """
    wrong = f"'{module}:{function}' is installed and no workload: a public function is one if it is annotated "
    wrong += "'-> Workload' in a module that imports Workload from fimo"
    if module.startswith("fimo.") and not module.startswith(SHIPPED):
        raise UsageError(f"{wrong}; of fimo's own those that are shipped (docs/workloads.md)")
    found = find_installed(module)
    if found is None:
        return  # The import itself tells what is missing.
    try:
        tree = ast.parse(Path(found.origin or "").read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise UsageError(wrong) from error
    made = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    if not _imports_workload(tree) or not made or function.startswith("_") or not _says_so(made[-1]):
        raise UsageError(wrong)


def _imports_workload(tree: ast.Module) -> bool:
    return any(
        (isinstance(node, ast.ImportFrom) and node.module in _OURS and any(n.name == "Workload" for n in node.names))
        or (isinstance(node, ast.Import) and any(n.name in _OURS for n in node.names))
        for node in ast.walk(tree)
    )


def _says_so(function: ast.FunctionDef) -> bool:
    returns = function.returns
    said = returns.value if isinstance(returns, ast.Constant) else ast.unparse(returns) if returns is not None else ""
    return str(said).rpartition(".")[2] == "Workload"


def _meant(error: BaseException) -> str:
    """Of a field of ``Workload`` that is misspelt: the one that is meant."""
    said = str(error)
    if not isinstance(error, TypeError) or "Workload.__init__() got an unexpected keyword argument" not in said:
        return ""
    return nearest(said.rsplit("'", 2)[-2], [field.name for field in fields(Workload)])


def _makes_workloads(make: Callable[..., Any], name: str) -> bool:
    """Whether a function of an installed module says that it makes a workload: a spec must not call any other."""
    returns = getattr(make, "__annotations__", {}).get("return")
    said = returns.rpartition(".")[2] == "Workload" if isinstance(returns, str) else returns is Workload
    return said and not name.startswith("_")


def _refuse_arguments(reference: str, make: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):
        return  # Call it all the same: not every callable tells its arguments.
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UsageError(f"workload_args do not fit {reference}{signature}: {error}") from error


def _with_paths(make: Callable[..., Any], arguments: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
    """The arguments with those that ``make`` annotates as ``Path`` found in the first of the folders that has them."""
    annotated = {
        name
        for name, kind in getattr(make, "__annotations__", {}).items()
        if kind in (Path, "Path", Path | None, "Path | None")
    }
    found = dict(arguments)
    for name in annotated & set(arguments):
        if isinstance(arguments[name], str | Path):
            own = Path(arguments[name]).expanduser()
            found[name] = next((folder / own for folder in folders if (folder / own).exists()), own)
    return found
