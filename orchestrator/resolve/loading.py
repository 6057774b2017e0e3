"""What a spec names, loaded and checked: the workload, θᶠ, files beside the spec; and the digests of what is loaded."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fimo.orchestrator.resolve import identity
from fimo.orchestrator.resolve.code import source_digest
from fimo.orchestrator.spec.shipped import SHIPPED
from fimo.orchestrator.spec.spec import Spec
from fimo.orchestrator.store import open_store
from fimo.workers.contract import check_contract
from fimo.workers.errors import StoreError, UsageError
from fimo.workers.examples import Examples
from fimo.workers.final_model import check_fits, final_copy, read_final_model
from fimo.workers.functional import FunctionalModel
from fimo.workers.workload import Workload, load_workload

MOST_BYTES = 2**36
"""Of a file that a spec names."""


def load_here(spec: Spec, beside: Path) -> tuple[Workload, dict[str, Tensor] | None]:
    """``load`` of a spec whose files are here; its final model is read if it can be this model's.

    Raises:
        UsageError, WorkloadError: as ``load`` and ``read_final``.
    """
    # First the code is read, so that what is not Python is told before any of it runs.
    source_digest(spec.workload, beside)
    # A file that is missing is told before the workload is loaded, which may take long.
    if spec.final_model is not None and "://" not in spec.final_model:
        read_final(spec, beside, look=True)
    workload = load_workload(spec.workload, spec.workload_args, beside)
    # Twice what float64 takes, and room for names.
    most = 16 * sum(t.numel() for t in workload.model.state_dict().values()) + 2**24
    return _fitting(spec, workload, read_final(spec, beside, most))


def read_final(spec: Spec, beside: Path, most: int = MOST_BYTES, look: bool = False) -> bytes | None:
    """The bytes of θᶠ's file, at most ``most`` of them, none if ``look``; None if the spec names none.

    Raises:
        UsageError: see ``read_beside``.
    """
    if spec.final_model is None:
        return None
    try:
        return read_beside(spec.final_model, beside, most, look)
    except UsageError as error:
        if spec.workload not in SHIPPED.values():
            raise
        module = spec.workload.partition(":")[0]
        raise UsageError(f"{error}; the workload's recipe trains it: python -m {module} --help") from error


def read_beside(name: str, beside: Path, most: int = MOST_BYTES, look: bool = False) -> bytes:
    """The bytes of a file that a spec names: a path beside the spec, or an object of a store.

    Args:
        look: find out whether it could be read, and read nothing of a path.

    Raises:
        UsageError: there is none, it cannot be read, is no file (a device has no end), or has more than ``most`` bytes.
    """
    if "://" in name:
        folder, _, key = name.rpartition("/")
        try:
            return open_store(folder).get(key)
        except StoreError as error:
            raise UsageError(f"'{name}' cannot be read: {error}") from error
    try:
        path = beside / Path(name).expanduser()
        # A pipe without a writer would hold an ordinary open for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise UsageError(f"'{name}' cannot be read: it is no regular file")
            if about.st_size > most:
                raise UsageError(f"'{name}' has {about.st_size:,} bytes, more than the {most:,} that can be meant")
            return b"" if look else file.read()
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"'{name}' cannot be read: {getattr(error, 'strerror', None) or error}") from error


def load(
    spec: Spec, beside: Path, final_model: bytes | None, elsewhere: Path | None = None
) -> tuple[Workload, dict[str, Tensor] | None]:
    """The workload and θᶠ, checked to fit each other and the contract; files may lie ``elsewhere`` too, code not."""
    source_digest(spec.workload, beside)
    return _fitting(spec, load_workload(spec.workload, spec.workload_args, beside, elsewhere), final_model)


def _fitting(spec: Spec, workload: Workload, final_model: bytes | None) -> tuple[Workload, dict[str, Tensor] | None]:
    state = None
    if final_model is not None:
        state = read_final_model(final_model, str(spec.final_model))
        check_fits(workload.model, state, str(spec.final_model))
    cpu, dtype = torch.device("cpu"), _dtype(spec)
    train, evals = (Examples(of, workload.collate, cpu, dtype) for of in (workload.train, workload.evals))
    if spec.evals is not None and spec.evals > len(evals):
        raise UsageError(f"evals asks for {spec.evals} evaluation examples; the workload has {len(evals)}")
    check_contract(model_of(spec, workload, state, cpu), train, evals.first(spec.evals or len(evals)))
    return workload, state


def model_of(
    spec: Spec, workload: Workload, state: Mapping[str, Tensor] | None, device: torch.device
) -> FunctionalModel:
    """The model at θᶠ on a device, in the sweep's precision."""
    return FunctionalModel(workload, state, device, _dtype(spec), spec.further_training.settings().trains)


def count_evals(spec: Spec, workload: Workload) -> int:
    """How many evaluation examples a sweep uses: as the spec says, or all."""
    return spec.evals or len(Examples(workload.evals, workload.collate))


def _dtype(spec: Spec) -> torch.dtype:
    return torch.float64 if spec.further_training.precision == "float64" else torch.float32


def examples_of(workload: Workload, spec: Spec, evals: int, device: torch.device) -> tuple[Examples, Examples]:
    """Training examples, and the sweep's evaluation examples, on a device, in the sweep's precision."""
    train = Examples(workload.train, workload.collate, device, _dtype(spec))
    return train, Examples(workload.evals, workload.collate, device, _dtype(spec)).first(evals)


@dataclass(frozen=True)
class Digests:
    """What a number depends on, as digests.

    Attributes:
        about: by part: the workload's code (``source``), training examples (``train``), evaluation examples that are
            used (``evals``), ``architecture`` and ``final_model``.
        result, estimate: of all that a delta, and all that an estimate at θᶠ, depends on.
    """

    about: dict[str, str]
    result: str
    estimate: str


def digests(spec: Spec, beside: Path, workload: Workload, state: Mapping[str, Tensor] | None, evals: int) -> Digests:
    """The digests of a loaded workload; ``spec`` has its removal mode settled, for ``result`` to be the sweep's."""
    # In float64, which holds every θᶠ exactly, whatever the model's own precision.
    model = final_copy(workload.model, state, "cpu", torch.float64)
    about = {
        "source": source_digest(spec.workload, beside),
        "train": identity.examples_digest(Examples(workload.train, workload.collate)),
        "evals": identity.examples_digest(Examples(workload.evals, workload.collate).first(evals)),
        "architecture": identity.architecture(workload.model),
        "final_model": identity.tensors_digest(sorted(model.state_dict().items())),
    }
    every: dict[str, Any] = {"workload": spec.workload, "workload_args": spec.workload_args, **about}
    training = identity.training_identity(spec.further_training)
    at_final = {name: training[name] for name in identity.AT_FINAL if name in training}
    return Digests(
        about,
        identity.result_digest(**every, further_training=training),
        identity.result_digest(**every, further_training=at_final),
    )
