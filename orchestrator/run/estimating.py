"""One estimator on one sweep: its values from a prepared workload."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from fimo import estimators
from fimo.orchestrator.resolve.resolved import Resolved
from fimo.orchestrator.run.budget import too_dear
from fimo.orchestrator.run.results import TooDearError
from fimo.workers.displacement import mean_displacement
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.start import Start


@dataclass(frozen=True)
class Run:
    """One seed's share of the estimate of an estimator that trains runs of its own.

    Attributes:
        seed: to train with.
        start: what the sweep's cells share, with the engine that is proven for them; ``replicas``: trained together;
            None for one that does not train in the sweep's stacks.
    """

    seed: int
    start: Start | None = None
    replicas: int | None = None


def asked(
    prepared: Resolved,
    device: torch.device,
    estimator: str,
    params: str,
    removals: Sequence[Sequence[int]],
    evals: tuple[int, int],
    say: Callable[[str], None] | None = None,
    run: Run | None = None,
    tasks: int | None = None,
    at: int | None = None,
) -> Callable[[], estimators.Estimate]:
    """An estimator's values for some removals and a span (first, count) of evaluation examples, ready to be computed.

    Args:
        say: told what the estimator says on the way.
        run: of an estimator that trains runs of its own: what this share of its values is trained with.
        at: the recorded step that is wanted; None = all.
        tasks: of an estimator of the default set, which has a budget: how many tasks like this one it has.

    Raises:
        FimoError: in one line, if the estimator does not apply or its values are not finite; TooDearError if it has a
            budget and would exceed it.
    """
    [named] = estimators.parse({"name": estimator, **json.loads(params)})
    start = None if run is None else run.start
    model, train, every = _shared(prepared, device) if start is None else (start.model, start.train, start.examples)
    problem = estimators.Problem(
        model=model,
        train=train,
        evals=every.span(*evals),
        removals=removals,
        further_training=prepared.spec.further_training.settings(),
        seeds=list(prepared.spec.seeds) if run is None else [run.seed],
        start=start,
        replicas=None if run is None else run.replicas,
        at=None if at is None else (at,),
        progress=say,
    )
    if tasks is not None:
        dear = too_dear(named, problem, tasks, prepared.spec, prepared.manifest.steps[-1])
        if dear is not None:
            raise TooDearError(dear)
    return partial(_estimate, named, problem, prepared)


def _estimate(named: estimators.Estimator, problem: estimators.Problem, prepared: Resolved) -> estimators.Estimate:
    """With the baseline's displacement first, if the estimator needs it."""
    step = named.params().get("displacement_step")
    if isinstance(step, int):
        moved = mean_displacement(prepared.start(problem.model.device), prepared.spec.seeds, [step])
        problem = replace(problem, displacement=moved)
    found = named.estimate(problem)
    return replace(found, notes={**found.notes, "units": named.units})


def _shared(prepared: Resolved, device: torch.device) -> tuple[FunctionalModel, Examples, Examples]:
    return prepared.model(device), *prepared.examples(device)
