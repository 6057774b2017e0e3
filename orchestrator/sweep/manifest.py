"""The manifest: what a run resolved its spec to; enough to tell progress and to reduce without the workload."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.spec.spec import Spec, parse


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
        }


def from_json(values: Any) -> Manifest:
    """A manifest from JSON that anybody may have written.

    Raises:
        UsageError: its spec is not one.
        KeyError, TypeError, ValueError: the rest is not a manifest.
    """
    removals = [NamedRemoval(i, str(n), tuple(map(int, x))) for i, (n, x) in enumerate(values["removals"])]
    return Manifest(
        spec=parse(values["spec"], "the stored spec"),
        beside=str(values["beside"]),
        source=str(values["source"]),
        digest=str(values["digest"]),
        estimate_digest=str(values["estimate_digest"]),
        train=int(values["train"]),
        evals=int(values["evals"]),
        scalars=int(values["scalars"]),
        steps=tuple(map(int, values["steps"])),
        removals=tuple(removals),
        estimators=tuple((str(n), str(p)) for n, p in values["estimators"]),
        left_out=tuple((str(n), str(why)) for n, why in values["left_out"]),
        train_digest=str(values.get("train_digest", "")),
        eval_digests=tuple(map(str, values.get("eval_digests", ()))),
        about=tuple(sorted((str(part), str(of)) for part, of in dict(values.get("about", {})).items())),
        names=tuple((int(index), _text(own), _text(label)) for index, own, label in values.get("names", ())),
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
