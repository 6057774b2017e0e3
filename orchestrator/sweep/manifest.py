"""The manifest: what a run resolved its spec to; enough to tell progress and to reduce without the workload."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fimo.estimators import declared
from fimo.orchestrator.spec import limits
from fimo.orchestrator.spec.canonical import canonical
from fimo.orchestrator.spec.removals import NamedRemoval, check_removals
from fimo.orchestrator.spec.spec import Spec, parse
from fimo.workers.amounts import steps_recorded


@dataclass(frozen=True)
class Manifest:
    """A resolved spec, as plain values: recorded in the store, and given to every task.

    Attributes:
        beside: the folder in which the spec's modules and files lie.
        source: digest of the workload's code, held against what a resume finds.
        digest: of all that a delta depends on; ``estimate_digest``: of all that an estimate at θᶠ depends on.
        train, evals: numbers of training examples and of the sweep's evaluation examples.
        scalars: number of trainable scalars.
        steps: the recorded steps, ascending.
        removals: in spec order, numbered from 0.
        estimators: (name, canonical params) in spec order.
        left_out: estimators of the default set that do not suit this model, with the reason.
        train_digest: of the training examples; ``eval_digests``: one of each evaluation example, in order. By these two
            sweeps are known to be of the same data; empty in a manifest from before they were recorded.
        about: (part, digest) of what ``digest`` is made from, to say what has changed; empty in older manifests.
        names: (training index, its id, its label) of every removed example, as the workload has them; None where it
            has none.
        settled: False while a run may still add seeds (``until_reliability``): what is there is then not all.
    """

    spec: Spec
    beside: str
    source: str
    digest: str
    estimate_digest: str
    train: int
    evals: int
    scalars: int
    steps: tuple[int, ...]
    removals: tuple[NamedRemoval, ...]
    estimators: tuple[tuple[str, str], ...]
    left_out: tuple[tuple[str, str], ...] = ()
    train_digest: str = ""
    eval_digests: tuple[str, ...] = ()
    about: tuple[tuple[str, str], ...] = ()
    names: tuple[tuple[int, str | None, str | None], ...] = ()
    settled: bool = True

    @property
    def cells(self) -> int:
        """Removals × seeds."""
        return len(self.removals) * self.spec.seeds.count

    def with_seeds(self, count: int) -> Manifest:
        """The same of a sweep that has come to use ``count`` seeds."""
        seeds = self.spec.seeds.model_copy(update={"count": count})
        return replace(self, spec=self.spec.model_copy(update={"seeds": seeds}))

    def json(self) -> dict[str, Any]:
        """As plain JSON values; ``from_json`` gives the manifest back."""
        return {
            "spec": self.spec.canonical(),
            "beside": self.beside,
            "source": self.source,
            "digest": self.digest,
            "estimate_digest": self.estimate_digest,
            "train": self.train,
            "evals": self.evals,
            "scalars": self.scalars,
            "steps": list(self.steps),
            "removals": [[r.name, list(r.indices)] for r in self.removals],
            "estimators": [list(e) for e in self.estimators],
            "left_out": [list(e) for e in self.left_out],
            "train_digest": self.train_digest,
            "eval_digests": list(self.eval_digests),
            "about": dict(self.about),
            "names": [list(of) for of in self.names],
            "settled": self.settled,
        }


def check_sweep(spec: Spec, removals: int, evals: int, recorded: int) -> None:
    """Refuse a sweep that is too large to be planned or held; raises UsageError."""
    asked = spec.resources.shard
    limits.check_size(removals, spec.seeds.count, None if asked == "auto" else asked, evals, recorded)


MOST = 2**62
"""A number in a manifest, at most."""
_DIGEST = re.compile("[0-9a-f]{64}")


def from_json(values: Any) -> Manifest:
    """A manifest from JSON that anybody may have written: one that a run could have written, or an error.

    Raises:
        UsageError: its spec is not one, or asks for more than can be.
        KeyError, TypeError, ValueError: the rest is not a manifest.
    """
    spec = parse(values["spec"], "its spec")
    settings, train, evals = spec.further_training.settings(), _whole(values["train"], 1), _whole(values["evals"], 1)
    limits.check_recorded(train, settings)
    steps = tuple(map(_whole, _list(values["steps"])))
    listed = _list(values["removals"])
    check_sweep(spec, len(listed), evals, len(steps))
    if list(steps) != steps_recorded(train, settings) or steps[-1] > MOST:
        raise ValueError("its steps are not those of its further training")
    limits.check_removals([len(_list(indices)) for _, indices in listed])
    removals = [
        NamedRemoval(number, _name(name), tuple(map(_whole, indices))) for number, (name, indices) in enumerate(listed)
    ]
    manifest = Manifest(
        spec=_in_order(spec, removals),
        beside=_name(values["beside"]),
        source=_digest(values["source"]),
        digest=_digest(values["digest"]),
        estimate_digest=_digest(values["estimate_digest"]),
        train=train,
        evals=evals,
        scalars=_whole(values["scalars"]),
        steps=steps,
        removals=tuple(check_removals(removals, train)),
        estimators=tuple((_name(n), _params(_name(n), p)) for n, p in _list(values["estimators"])),
        left_out=tuple((_name(n), _name(why)) for n, why in _list(values["left_out"])),
        train_digest=_name(values.get("train_digest", "")),
        eval_digests=tuple(map(_name, _list(values.get("eval_digests", [])))),
        about=tuple(sorted((_name(part), _name(of)) for part, of in dict(values.get("about", {})).items())),
        names=tuple((_whole(index), _text(own), _text(label)) for index, own, label in _list(values.get("names", []))),
        settled=_flag(values.get("settled", True)),
    )
    if manifest.eval_digests and len(manifest.eval_digests) != evals:
        raise ValueError("it has not one digest for each evaluation example")
    return manifest


def _in_order(spec: Spec, removals: Sequence[NamedRemoval]) -> Spec:
    """The spec with its groups in the order that they are numbered in, which the sorted keys of JSON do not keep."""
    groups = spec.removals.groups
    if groups is None:
        return spec
    ordered = {removal.name: groups[removal.name] for removal in removals if removal.name in groups}
    section = spec.removals.model_copy(update={"groups": {**ordered, **groups}})
    return spec.model_copy(update={"removals": section})


def _whole(value: Any, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
        raise ValueError(f"a number in it is none that can be: {str(value)[:40]}")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"what is true or false in it is neither: {str(value)[:40]}")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text in it is none: {str(value)[:40]}")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"a list in it is none: {str(value)[:40]}")
    return value


def _digest(value: Any) -> str:
    if not _DIGEST.fullmatch(_name(value)):
        raise ValueError("a digest in it is none")
    return str(value)


def _params(estimator: str, params: Any) -> str:
    """Canonical JSON of the hyper-parameters of an estimator that there is."""
    values = json.loads(_name(params))
    if canonical(values) != params or len(declared.parse({**values, "name": estimator})) != 1:
        raise ValueError(f"the hyper-parameters of {estimator} in it are none")
    return str(params)


def _text(value: Any) -> str | None:
    return None if value is None else _name(value)
