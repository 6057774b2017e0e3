"""The candidates of a search over further training: every combination of learning rate, optimizer and removal mode.

Each is a sweep of its own digest: its parts lie beside the searched sweep's under that digest, and are resumed like
any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fimo.orchestrator.resolve.resolved import Resolved
from fimo.orchestrator.spec.search import SearchedTraining
from fimo.orchestrator.spec.training import SGD, Adam, AdamW
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.workers.errors import UsageError

KINDS = {"sgd": SGD, "adam": Adam, "adamw": AdamW}


@dataclass(frozen=True)
class Candidate:
    """One further training: ``manifest`` has its digest, and the first of the spec's seeds as many as it may get."""

    optimizer: str
    lr: float
    removal_mode: str
    manifest: Manifest

    @property
    def name(self) -> str:
        """Its digest, 64 hex digits."""
        return self.manifest.digest

    def with_seeds(self, count: int) -> Manifest:
        """The sweep of so many seeds, and without estimators."""
        return self.manifest.with_seeds(count)


def candidates_of(resolved: Resolved, section: SearchedTraining) -> tuple[Candidate, ...]:
    """Every combination, each once.

    Raises:
        UsageError: one of them cannot be: this model has no such removal mode.
    """
    base = resolved.spec.further_training
    optimizers = section.optimizer or (base.optimizer.name,)
    modes, found = section.removal_mode or (base.removal_mode,), dict[str, Candidate]()
    for name in optimizers:
        for mode in modes:
            for lr in section.lr or (base.optimizer.lr,):
                own = base.optimizer if name == base.optimizer.name else KINDS[name](name=name)
                training = base.model_copy(
                    update={"optimizer": own.model_copy(update={"lr": lr}), "removal_mode": mode}
                )
                try:
                    changed = resolved.further_trained(training)
                except UsageError as error:
                    raise UsageError(f"search.further_training, {name} in {mode} mode: {error}") from error
                one = Candidate(name, lr, str(changed.spec.further_training.removal_mode), _plain(changed.manifest))
                found.setdefault(one.name, one)
    return tuple(found.values())


def _plain(manifest: Manifest) -> Manifest:
    """Without estimators, and with witnesses of one seed, which measure the floor that no effect may lie under."""
    spec = manifest.spec
    seeds = spec.seeds.model_copy(update={"until_reliability": None})
    changed: Mapping[str, Any] = {"seeds": seeds, "estimators": ()}
    if spec.resources.witnesses != 0:
        changed = {**changed, "resources": spec.resources.model_copy(update={"witnesses": 1})}
    return replace(manifest, spec=spec.model_copy(update=changed), estimators=(), left_out=())


def groups_of(candidates: tuple[Candidate, ...]) -> list[tuple[Candidate, ...]]:
    """Those that differ in their learning rate alone, which can be trained in the same stacks."""
    groups: dict[tuple[str, str], list[Candidate]] = {}
    for one in candidates:
        groups.setdefault((one.optimizer, one.removal_mode), []).append(one)
    return [tuple(group) for group in groups.values()]
