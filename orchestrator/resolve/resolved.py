"""From a spec to what a process computes with: workload, θᶠ, manifest. The same code on the driver and on a worker.

A worker compares its digests with the driver's before it computes anything: other code or data on one node is an
error, never a number.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fimo import estimators
from fimo.orchestrator.resolve import UPLOADED, identity
from fimo.orchestrator.resolve.at_hand import HERE, Own, own_folder
from fimo.orchestrator.resolve.columns import read_column
from fimo.orchestrator.resolve.differences import UNSTABLE, in_words, since, what_differs
from fimo.orchestrator.resolve.loading import count_evals, digests, examples_of, load, load_here, model_of, read_beside
from fimo.orchestrator.spec import limits
from fimo.orchestrator.spec.canonical import canonical
from fimo.orchestrator.spec.removals import NamedRemoval, check_removals, number_removals
from fimo.orchestrator.spec.spec import Spec
from fimo.orchestrator.spec.training import FurtherTraining
from fimo.orchestrator.sweep.manifest import Manifest, check_sweep
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.amounts import steps_recorded
from fimo.workers.contract import names_of
from fimo.workers.errors import UsageError, WorkloadError
from fimo.workers.examples import Examples
from fimo.workers.forward import observe, refuse_mixing
from fimo.workers.functional import FunctionalModel
from fimo.workers.stacking import probe
from fimo.workers.start import Engine, Start, start_from
from fimo.workers.workload import Workload


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
        return model_of(self.spec, self.workload, self.state, device)

    def examples(self, device: torch.device) -> tuple[Examples, Examples]:
        """Training and evaluation examples on a device, in the sweep's precision; the latter cut to the sweep's."""
        return examples_of(self.workload, self.spec, self.manifest.evals, device)

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
    model, examples = model_of(spec, workload, state, cpu), examples_of(workload, spec, evals, cpu)
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


def _named(given: list[estimators.Estimator]) -> tuple[tuple[str, str], ...]:
    named = [(e.name, canonical(e.params())) for e in given]
    repeated = {n for n in named if named.count(n) > 1}
    if repeated:
        name, params = min(repeated)
        raise UsageError(f"estimator {name} {params} is given twice")
    return tuple(named)
