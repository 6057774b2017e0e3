"""From a spec to what a process computes with: workload, θᶠ, manifest. The same code on the driver and on a worker.

A worker compares its digests with the driver's before it computes anything: other code or data on one node is an
error, never a number.
"""

from __future__ import annotations

import os
import platform
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fimo import estimators
from fimo.orchestrator.resolve import UPLOADED, identity
from fimo.orchestrator.resolve.at_hand import HERE, Own, own_folder
from fimo.orchestrator.resolve.code import source_digest
from fimo.orchestrator.resolve.columns import read_column
from fimo.orchestrator.resolve.differences import UNSTABLE, in_words, since, what_differs
from fimo.orchestrator.spec import limits
from fimo.orchestrator.spec.canonical import canonical
from fimo.orchestrator.spec.removals import NamedRemoval, check_removals, number_removals
from fimo.orchestrator.spec.shipped import SHIPPED
from fimo.orchestrator.spec.spec import Spec
from fimo.orchestrator.spec.training import FurtherTraining
from fimo.orchestrator.store import open_store
from fimo.orchestrator.sweep.manifest import Manifest, check_sweep
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.amounts import steps_recorded
from fimo.workers.contract import check_contract, names_of
from fimo.workers.errors import StoreError, UsageError, WorkloadError
from fimo.workers.examples import Examples
from fimo.workers.final_model import check_fits, final_copy, read_final_model
from fimo.workers.forward import observe, refuse_mixing
from fimo.workers.functional import FunctionalModel
from fimo.workers.stacking import probe
from fimo.workers.start import Engine, Start, start_from
from fimo.workers.workload import Workload, load_workload

MOST_BYTES = 2**36
"""Of a file that a spec names."""


@dataclass(frozen=True)
class Resolved:
    """A manifest with the workload and θᶠ that it was, or is, resolved from.

    Attributes:
        state: θᶠ by parameter and buffer name; None if the workload's model carries it.
    """

    manifest: Manifest
    workload: Workload
    state: dict[str, Tensor] | None

    @property
    def spec(self) -> Spec:
        """The manifest's spec."""
        return self.manifest.spec

    def model(self, device: torch.device) -> FunctionalModel:
        """The model at θᶠ on a device, in the sweep's precision."""
        return _model(self.spec, self.workload, self.state, device)

    def examples(self, device: torch.device) -> tuple[Examples, Examples]:
        """Training and evaluation examples on a device, in the sweep's precision; the latter cut to the sweep's."""
        return _examples(self.workload, self.spec, self.manifest.evals, device)

    def reweighted(self, weight: float) -> Resolved:
        """The same in reweight mode at a removal weight: a sweep of its own digest, whatever else is equal.

        Raises:
            UsageError: the training forward mixes the examples of a batch, so that there is no such mode.
        """
        changed = {"removal_mode": "reweight", "removal_weight": weight}
        return self.further_trained(self.spec.further_training.model_copy(update=changed))

    def further_trained(self, section: FurtherTraining) -> Resolved:
        """The same with another further training: a sweep of its own digest, whatever else is equal.

        Raises:
            UsageError: this model cannot be trained so.
        """
        beside = Path(self.manifest.beside)
        spec, cpu = self.spec.model_copy(update={"further_training": section}), torch.device("cpu")
        spec = _settled(spec, self.model(cpu), self.examples(cpu)[0])
        own = digests(spec, beside, self.workload, self.state, self.manifest.evals)
        steps = tuple(steps_recorded(self.manifest.train, section.settings()))
        changed_manifest = replace(
            self.manifest, spec=spec, digest=own.result, estimate_digest=own.estimate, steps=steps
        )
        return replace(self, manifest=changed_manifest)

    def start(self, device: torch.device) -> Start:
        """What the sweep's cells share.

        Raises:
            WorkloadError, DivergedError: see ``fimo.workers.start.start_from``.
        """
        settings, engine = self.spec.further_training.settings(), Engine(replay=self.spec.resources.replay)
        return start_from(self.model(device), *self.examples(device), settings, engine)


def resolve(spec: Spec, beside: Path, known: Sequence[NamedRemoval] | None = None) -> Resolved:
    """Load the workload and resolve removals, estimators and digests.

    Args:
        beside: the folder of the spec, in which the workload's module and the files that it names are looked for.
        known: the removals of a spec that names a file of them, which is then not read.

    Raises:
        UsageError, WorkloadError: in one line, before anything is written.
    """
    given, unsuited = [e for entry in spec.estimators or () for e in estimators.parse(entry)], list[tuple[str, str]]()
    workload, state = load_here(spec, beside)
    plain, evals = Examples(workload.train, workload.collate), count_evals(spec, workload)
    train = len(plain)
    limits.check_recorded(train, spec.further_training.settings())
    if spec.removals.file is not None and known is not None:
        removals = check_removals(known, train)
    else:
        removals = number_removals(
            spec.removals,
            train,
            lambda name: read_beside(name, beside, limits.MOST_LISTED),
            lambda name: read_column(plain, name),
        )
    check_sweep(spec, len(removals), evals, len(steps_recorded(train, spec.further_training.settings())))
    cpu = torch.device("cpu")
    model, examples = _model(spec, workload, state, cpu), _examples(workload, spec, evals, cpu)
    spec = _settled(spec, model, examples[0])
    settings = spec.further_training.settings()
    if spec.estimators is None:
        left_out = [r.indices for r in removals]
        given, unsuited = estimators.choose(estimators.Problem(model, *examples, left_out, settings, list(spec.seeds)))
    own = digests(spec, beside, workload, state, evals)
    manifest = Manifest(
        spec=spec,
        beside=str(beside),
        source=own.about["source"],
        digest=own.result,
        estimate_digest=own.estimate,
        train=train,
        evals=evals,
        scalars=sum(p.numel() for p in model.params.values()),
        steps=tuple(steps_recorded(train, settings)),
        removals=tuple(removals),
        estimators=_named(given),
        left_out=tuple(unsuited),
        train_digest=own.about["train"],
        eval_digests=identity.each_digest(Examples(workload.evals, workload.collate).first(evals)),
        about=tuple(sorted(own.about.items())),
        names=_names(workload, removals, train),
    )
    return Resolved(manifest, workload, state)


def _names(
    workload: Workload, removals: Sequence[NamedRemoval], n: int
) -> tuple[tuple[int, str | None, str | None], ...]:
    """Id and label of every removed example, if the workload has them."""
    known = names_of(workload, n)
    if not known:
        return ()
    ids, labels = known.get("ids"), known.get("labels")
    removed = sorted({index for removal in removals for index in removal.indices})
    return tuple((i, ids[i] if ids is not None else None, labels[i] if labels is not None else None) for i in removed)


def _settled(spec: Spec, model: FunctionalModel, train: Examples) -> Spec:
    """The spec with its removal mode written out; refuses one that this model does not have (UsageError)."""
    section = spec.further_training
    if section.removal_mode in ("drop", "mask"):
        return spec
    looked_at = probe.shortest(train, probe.proven_cuts(model, train), section.settings())
    forward = observe(model, looked_at, section.settings())
    settings = section.settings().settled(forward.mixes)
    refuse_mixing(forward, settings)
    mode = {"removal_mode": settings.removal_mode}
    return spec.model_copy(update={"further_training": section.model_copy(update=mode)})


def resolve_like(manifest: Manifest, final_model: bytes | None) -> Resolved:
    """On a worker: load what the driver has resolved.

    Args:
        final_model: the bytes of θᶠ's file (see ``read_final``).

    Raises:
        UsageError, WorkloadError: in one line; WorkloadError if code or data here are not the driver's.
    """
    driver, here = Path(manifest.beside), Path.cwd()
    # Code that came with the job wins over a folder that this machine has under the same path; data may lie there.
    beside = here if UPLOADED in os.environ or not driver.is_dir() else driver
    workload, state = load(manifest.spec, beside, final_model, driver)
    ours = digests(manifest.spec, beside, workload, state, count_evals(manifest.spec, workload))
    if (ours.result, ours.estimate) != (manifest.digest, manifest.estimate_digest):
        other = what_differs(dict(manifest.about), ours.about)
        raise WorkloadError(
            f"node {platform.node()} sees {in_words(other) or 'something'} otherwise than the driver: {UNSTABLE}"
        )
    return Resolved(manifest, workload, state)


def resolve_again(sweep: Sweep, own: Own = HERE) -> Resolved:
    """Resolve the spec of a sweep in its store, with the user's own code; of a file of removals it knows what it said.

    Raises:
        UsageError: the workload's code is not here, code or data are not what they were, or the sweep names files of
            which the user has not said that they may be read.
    """
    manifest = sweep.read_manifest()
    found = resolve(manifest.spec, own_folder(manifest, own, sweep.store.uri), manifest.removals)
    _refuse_changed(manifest, found.manifest, sweep.uri)
    return found


def _refuse_changed(was: Manifest, now: Manifest, uri: str) -> None:
    """Other data is another experiment: going on with it would train everything anew, under the old name."""
    if now.digest != was.digest:
        changed = in_words(since(was, now)) or "something that its numbers depend on"
        raise UsageError(
            f"{uri} cannot go on: since it was started {changed} changed. Put that back, or run the spec under another "
            "name (or with --replace)"
        )


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
    check_contract(_model(spec, workload, state, cpu), train, evals.first(spec.evals or len(evals)))
    return workload, state


def _model(spec: Spec, workload: Workload, state: Mapping[str, Tensor] | None, device: torch.device) -> FunctionalModel:
    return FunctionalModel(workload, state, device, _dtype(spec), spec.further_training.settings().trains)


def count_evals(spec: Spec, workload: Workload) -> int:
    """How many evaluation examples a sweep uses: as the spec says, or all."""
    return spec.evals or len(Examples(workload.evals, workload.collate))


def _dtype(spec: Spec) -> torch.dtype:
    return torch.float64 if spec.further_training.precision == "float64" else torch.float32


def _examples(workload: Workload, spec: Spec, evals: int, device: torch.device) -> tuple[Examples, Examples]:
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


def _named(given: list[estimators.Estimator]) -> tuple[tuple[str, str], ...]:
    named = [(e.name, canonical(e.params())) for e in given]
    repeated = {n for n in named if named.count(n) > 1}
    if repeated:
        name, params = min(repeated)
        raise UsageError(f"estimator {name} {params} is given twice")
    return tuple(named)
