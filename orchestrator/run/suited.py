"""Whether a sweep's estimators mean anything for its model, data and settings, and fit in memory: told before a run.

Nothing is computed but a gradient or two. How long an estimator takes is another question (``run/measure.py``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch

from fimo import estimators
from fimo.estimators.counts import Work
from fimo.orchestrator.resolve.resolved import Resolved
from fimo.orchestrator.run.blocks import Named, shares
from fimo.orchestrator.run.budget import too_large
from fimo.orchestrator.run.failures import Failures
from fimo.orchestrator.run.owed import estimators_in, missing_estimates
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.device import deterministic, pick_device
from fimo.workers.errors import FimoError, UsageError


@dataclass
class Judged:
    """Estimators that a run will not have, each with the reason in a line.

    Attributes:
        unsuited: they mean nothing for the sweep. What does not suit is not in the default set, so that these are named
            by the spec.
        too_large: one task of them holds more than the memory that is free here. The default set is run without them;
            what the spec names is tried all the same.
    """

    unsuited: dict[Named, str] = field(default_factory=dict)
    too_large: dict[Named, str] = field(default_factory=dict)


def judged(
    resolved: Resolved,
    only: Collection[Named] | None = None,
    before_memory: Callable[[], None] = lambda: None,
) -> Judged:
    """The estimators of a sweep, or ``only`` some of them, held against it on this machine.

    Args:
        before_memory: called before it is looked at how much memory is free, to wait for what holds some meanwhile.
    """
    manifest, spec, cpu = resolved.manifest, resolved.spec, torch.device("cpu")
    model, (train, evals) = resolved.model(cpu), resolved.examples(cpu)
    found, works = Judged(), dict[Named, Work]()
    # A task that is given a GPU is bounded by its memory, which is not known where there is none.
    device = pick_device(spec.resources.gpus)
    known = device.type == "cuda" or not spec.resources.gpus
    with deterministic(cpu):
        for name, params in manifest.estimators:
            if only is not None and (name, params) not in only:
                continue
            [named] = estimators.parse({"name": name, **json.loads(params)})
            seed, first, count = next(iter(shares(manifest, name, params)))
            problem = estimators.Problem(
                model,
                train,
                evals.span(first, count),
                removals=[r.indices for r in manifest.removals],
                further_training=spec.further_training.settings(),
                seeds=list(spec.seeds) if seed is None else [seed],
            )
            held = _held_against(named, problem, spec.estimators is not None)
            if isinstance(held, str):
                found.unsuited[name, params] = held
            else:
                works[name, params] = held
    before_memory()
    for of, work in works.items() if known else ():
        large = too_large(work, device)
        if large is not None:
            found.too_large[of] = large
    return found


def _held_against(named: estimators.Estimator, problem: estimators.Problem, asked: bool) -> str | Work:
    """Why it means nothing, or the work of one task of it.

    Args:
        asked: the spec names it; the default set has been held against the model when it was chosen.
    """
    try:
        reason = named.refuses(problem) if asked else None
        if reason is not None:
            return reason
        # Its hyper-parameters must fit the sweep for its work to be counted.
        return named.work(problem)
    except FimoError as error:
        return str(error).removeprefix(f"estimator {named.name}: ")


def refuse_unsuited(resolved: Resolved, sweep: Sweep) -> None:
    """Refuse a spec that names an estimator which cannot be had for its model, data and settings.

    One whose values the store holds could be had; to ask again takes longer than all else about a complete sweep.

    Raises:
        UsageError: one line: the first of them and why.
        StoreError: the store cannot be read.
    """
    if resolved.spec.estimators is None:
        return
    owed = estimators_in(missing_estimates(resolved.manifest, sweep, Failures((), {})))
    found = judged(resolved, owed).unsuited if owed else {}
    if found:
        (name, _), reason = next(iter(found.items()))
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UsageError(f"estimator {name} does not apply{more}: {reason}; leave it out of the spec's estimators")
