"""From a spec to what a process computes with: workload, θᶠ, digests. The same code on the driver and on every worker.

A worker compares its digest with the driver's before it computes anything: other code or data on one node is an error,
never a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fimo.orchestrator.resolve import identity
from fimo.orchestrator.spec.removals import NamedRemoval, resolve
from fimo.orchestrator.spec.spec import Spec
from fimo.orchestrator.store import open_store
from fimo.workers.errors import StoreError, UsageError
from fimo.workers.examples import Examples
from fimo.workers.final_model import check_fits, read_final_model
from fimo.workers.functional import FunctionalModel, check
from fimo.workers.start import Start, start_from
from fimo.workers.workload import Workload, load_workload
from torch import Tensor


@dataclass(frozen=True)
class Prepared:
    """A workload with the identity of its results.

    Attributes:
        source: digest of the workload's code.
        digest: of all that a delta depends on; ``estimate_digest``: of all that an estimate at θᶠ depends on.
        train, evals: numbers of training examples and of the sweep's evaluation examples.
    """

    spec: Spec
    workload: Workload
    state: dict[str, Tensor] | None
    source: str
    digest: str
    estimate_digest: str
    train: int
    evals: int

    @property
    def dtype(self) -> torch.dtype:
        """What the sweep computes in."""
        return torch.float64 if self.spec.further_training.precision == "float64" else torch.float32

    def model(self, device: torch.device) -> FunctionalModel:
        """The model at θᶠ on a device, in the sweep's precision."""
        return FunctionalModel(self.workload, self.state, device, self.dtype)

    def examples(self, device: torch.device) -> tuple[Examples, Examples]:
        """Training and evaluation examples on a device; the latter cut to the sweep's."""
        collate = self.workload.collate
        train = Examples(self.workload.train, collate, device, self.dtype)
        return train, Examples(self.workload.evals, collate, device, self.dtype).first(self.evals)

    def start(self, device: torch.device) -> Start:
        """What the sweep's cells share."""
        return start_from(self.model(device), *self.examples(device), self.spec.further_training.settings())


def read_beside(name: str, beside: Path) -> bytes:
    """The bytes of a file that a spec names: a path beside the spec, or an object of a store.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    if "://" in name:
        folder, _, key = name.rpartition("/")
        try:
            return open_store(folder).get(key)
        except StoreError as error:
            raise UsageError(f"'{name}' cannot be read: {error}") from error
    try:
        return (beside / Path(name).expanduser()).read_bytes()
    except OSError as error:
        raise UsageError(f"'{name}' cannot be read: {error.strerror or error}") from error


def prepare(spec: Spec, beside: Path, final_model: bytes | None) -> Prepared:
    """Load the workload and θᶠ and take their digests.

    Args:
        beside: the folder of the spec, in which the workload's module is looked for.
        final_model: the bytes of the file that ``spec.final_model`` names, None where it names none.

    Raises:
        UsageError, WorkloadError: in one line, what does not fit the contract.
    """
    source = identity.source_digest(spec.workload, beside)
    workload = load_workload(spec.workload, spec.workload_args, beside)
    state = None
    if final_model is not None:
        state = read_final_model(final_model, str(spec.final_model))
        check_fits(workload.model, state, str(spec.final_model))
    train, evals = Examples(workload.train, workload.collate), Examples(workload.evals, workload.collate)
    if len(train) < 2 or len(evals) < 1:
        raise UsageError(f"the workload has {len(train)} training and {len(evals)} evaluation examples: too few")
    if spec.evals is not None and spec.evals > len(evals):
        raise UsageError(f"evals asks for {spec.evals} evaluation examples; the workload has {len(evals)}")
    count = spec.evals or len(evals)
    model = FunctionalModel(workload, state)
    some = min(4, len(train))
    check(model, train.batch(range(some)), some)
    ours = model.module.state_dict()
    about: dict[str, Any] = {
        "workload": spec.workload,
        "workload_args": spec.workload_args,
        "source": source,
        "train": identity.examples_digest(train),
        "evals": identity.examples_digest(evals.first(count)),
        "final_model": identity.tensors_digest(sorted(ours.items())),
    }
    training = identity.training_identity(spec.further_training)
    at_final = {"precision": spec.further_training.precision}
    return Prepared(
        spec=spec,
        workload=workload,
        state=state,
        source=source,
        digest=identity.result_digest(**about, further_training=training),
        estimate_digest=identity.result_digest(**about, further_training=at_final),
        train=len(train),
        evals=count,
    )


def resolve_removals(prepared: Prepared, beside: Path) -> list[NamedRemoval]:
    """The spec's removals against the workload's training set."""
    return resolve(prepared.spec.removals, prepared.train, lambda name: read_beside(name, beside))
