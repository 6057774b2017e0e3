"""One estimator on one sweep: what its values depend on, and their computation from a prepared workload."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from fimo.orchestrator.resolve.resolved import Resolved
from fimo.orchestrator.spec.canonical import digest
from fimo.orchestrator.spec.spec import Spec
from fimo.workers.displacement import mean_displacement

from fimo import estimators

FOLLOW_TRAINING = ("unrolled", "ekfac_matched")
"""Estimators of an amount: their values depend on the further-training section."""


def estimate_identity(result_digest: str, at_final_digest: str, spec: Spec, estimator: str, params: str) -> str:
    """The digest in the keys of an estimator's blocks.

    θᶠ, the workload and the data for all; the further-training section for those that follow it; the seeds that they
    average over for those that follow single runs.
    """
    [found] = estimators.parse({"name": estimator, **json.loads(params)})
    values = found.params()
    if values.get("displacement_step") is not None:
        return digest([result_digest, list(spec.seeds)])
    if estimator == "unrolled":
        return digest([result_digest, list(spec.seeds)[: _count(values.get("seeds"))]])
    return result_digest if estimator in FOLLOW_TRAINING else at_final_digest


def _count(value: object) -> int | None:
    return value if isinstance(value, int) else None


def estimate(
    prepared: Resolved,
    device: torch.device,
    estimator: str,
    params: str,
    removals: Sequence[Sequence[int]],
    evals: tuple[int, int],
) -> estimators.Estimate:
    """An estimator's values for some removals and a span (first, count) of evaluation examples.

    Raises:
        FimoError: in one line, where the estimator does not apply or its values are not finite.
    """
    [found] = estimators.parse({"name": estimator, **json.loads(params)})
    train, every = prepared.examples(device)
    step, displacement = found.params().get("displacement_step"), None
    if isinstance(step, int):
        displacement = mean_displacement(prepared.start(device), prepared.spec.seeds, [step])
    problem = estimators.Problem(
        model=prepared.model(device),
        train=train,
        evals=every.span(*evals),
        removals=removals,
        further_training=prepared.spec.further_training.settings(),
        seeds=list(prepared.spec.seeds),
        displacement=displacement,
    )
    return found.estimate(problem)
