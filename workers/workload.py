"""The workload contract: what a user writes to bring a model.

Does not train, schedule or read a store. A workload module is the user's code and is run as such; everything
else that fimo reads (specs, parts, tables, final models) is data alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import InspectLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from fimo.workers.errors import FimoError, UsageError, WorkloadError, nearest
from fimo.workers.examples import Batch, Dataset

_IMPORTS = re.compile(r"^\s*from fimo(\.workers\.workload)? import .*\bWorkload\b", re.MULTILINE)


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
    if not separator or not module or not function.isidentifier():
        raise UsageError(f"workload '{reference}' is not of the form module:function")
    stem = beside.joinpath(*module.split("."))
    for path in (stem.with_suffix(".py"), stem / "__init__.py"):
        if path.is_file():
            return module, function, path
    return module, function, None


def _import(module: str, path: Path | None, beside: Path) -> ModuleType:
    if path is not None:
        loaded = sys.modules.get(module)
        if loaded is not None and Path(getattr(loaded, "__file__", None) or "").resolve() != path.resolve():
            del sys.modules[module]
        # Move it to the front even if it is there already: another spec's folder may have come before it since.
        sys.path[:] = [str(beside), *(entry for entry in sys.path if entry != str(beside))]
        importlib.invalidate_caches()
    return importlib.import_module(module)


def load_workload(reference: str, arguments: Mapping[str, Any], beside: Path) -> Workload:
    """Import ``module:function``, from ``beside`` if the module is there, and call the function.

    An argument that the function annotates as ``Path`` is given as one: of the file in ``beside`` if there is one, else
    as it stands, which is relative to the working directory.

    Raises:
        UsageError: no such module or function, or arguments that it does not take.
        WorkloadError: the function raised, or returned something else than a Workload.
    """
    module, function, path = find_module(reference, beside)
    if path is None:
        _refuse_foreign(module)
    try:
        loaded = _import(module, path, beside)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            raise UsageError(f"workload module '{module}' not found beside the spec or installed") from error
        raise WorkloadError(f"workload module '{module}' needs '{error.name}', which is not installed") from error
    except Exception as error:
        raise WorkloadError(f"workload module '{module}' failed to import: {_line(error)}") from error
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
        workload = make(**_with_paths(make, arguments, beside))
    except FimoError:
        raise  # It is one line already.
    except Exception as error:
        raise WorkloadError(f"workload {reference} failed: {_line(error)}") from error
    if not isinstance(workload, Workload):
        raise WorkloadError(
            f"workload {reference} returned {type(workload).__name__}, not a fimo.workers.workload.Workload"
        )
    return workload


def _refuse_foreign(module: str) -> None:
    """An installed module must be one of workloads: a spec from a stranger must not call ``subprocess:run``."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return  # The import itself tells what is missing.
    if spec is None:
        return
    source = spec.loader.get_source(module) if isinstance(spec.loader, InspectLoader) else None
    if source is None or not _IMPORTS.search(source):
        raise UsageError(
            f"module '{module}' is installed but no module of workloads: it does not import Workload from fimo"
        )


def _makes_workloads(make: Callable[..., Any], name: str) -> bool:
    """Whether a function of an installed module says that it makes a workload: a spec must not call any other."""
    returns = getattr(make, "__annotations__", {}).get("return")
    return not name.startswith("_") and returns in (Workload, "Workload", "fimo.Workload")


def _refuse_arguments(reference: str, make: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):
        return  # Call it all the same: not every callable tells its arguments.
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UsageError(f"workload_args do not fit {reference}{signature}: {error}") from error


def _with_paths(make: Callable[..., Any], arguments: Mapping[str, Any], beside: Path) -> dict[str, Any]:
    """The arguments with those that ``make`` annotates as ``Path`` found beside the spec."""
    annotated = {
        name
        for name, kind in getattr(make, "__annotations__", {}).items()
        if kind in (Path, "Path", Path | None, "Path | None")
    }
    found = dict(arguments)
    for name in annotated & set(arguments):
        if isinstance(arguments[name], str | Path):
            own = Path(arguments[name]).expanduser()
            found[name] = beside / own if (beside / own).exists() else own
    return found


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
