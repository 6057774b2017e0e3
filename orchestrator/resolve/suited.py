"""Whether the estimators that a spec names mean anything for its model, data and settings: told before anything runs.

Nothing is computed but a gradient or two. What an estimator costs is another question (``run/measure.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch

from fimo import estimators
from fimo.orchestrator.resolve.resolved import Resolved
from fimo.workers.device import deterministic
from fimo.workers.errors import FimoError, UsageError

Named = tuple[str, str]
"""An estimator's name and its canonical params."""


def unsuited(resolved: Resolved) -> dict[Named, str]:
    """The estimators that the spec names and that cannot be had for this sweep, each with the reason in a line."""
    if resolved.spec.estimators is None:
        return {}  # What does not suit is not in the default set.
    return dict(_unsuited(resolved))


def _unsuited(resolved: Resolved) -> Iterator[tuple[Named, str]]:
    manifest, device = resolved.manifest, torch.device("cpu")
    problem = estimators.Problem(
        resolved.model(device),
        *resolved.examples(device),
        removals=[r.indices for r in manifest.removals],
        further_training=resolved.spec.further_training.settings(),
    )
    seeds = resolved.spec.seeds
    with deterministic(device):
        for name, params in manifest.estimators:
            [named] = estimators.parse({"name": name, **json.loads(params)})
            own = problem.with_seeds(named.runs(tuple(seeds), seeds.after) or tuple(seeds))
            try:
                reason = named.refuses(own)
                if reason is None:
                    named.work(own)  # counts what it would do, for which its hyper-parameters must fit the sweep
            except FimoError as error:
                reason = str(error).removeprefix(f"estimator {name}: ")
            if reason is not None:
                yield (name, params), reason


def refuse_unsuited(resolved: Resolved) -> None:
    """Refuse a spec that names an estimator which cannot be had for its model, data and settings.

    Raises:
        UsageError: one line: the first of them and why.
    """
    found = unsuited(resolved)
    if found:
        (name, _), reason = next(iter(found.items()))
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UsageError(f"estimator {name} does not apply{more}: {reason}; leave it out of the spec's estimators")
