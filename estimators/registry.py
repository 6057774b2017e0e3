"""The shipped estimators by name, and which of them run if a spec names none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fimo.estimators.amounts import linear
from fimo.estimators.base import Estimator
from fimo.estimators.cg import CG
from fimo.estimators.datainf import DataInf
from fimo.estimators.ekfac import EKFAC
from fimo.estimators.ekfac_matched import EKFACMatched
from fimo.estimators.entries import parse_entry
from fimo.estimators.grad_cos import GradCos
from fimo.estimators.grad_dot import GradDot
from fimo.estimators.lissa import LiSSA, LiSSAH
from fimo.estimators.lissa_matched import LiSSAMatched
from fimo.estimators.mirrored import Mirrored
from fimo.estimators.problem import Problem
from fimo.estimators.trak import TRAK
from fimo.estimators.unrolled import Unrolled

REGISTRY: dict[str, type[Any]] = {
    kind.name: kind
    for kind in (
        GradDot,
        GradCos,
        DataInf,
        TRAK,
        EKFAC,
        CG,
        LiSSA,
        LiSSAH,
        EKFACMatched,
        LiSSAMatched,
        Unrolled,
        Mirrored,
    )
}
"""Estimators by the name that specs and tables use."""


DEFAULTS = (
    "grad_dot",
    "grad_cos",
    "datainf",
    "trak",
    "ekfac",
    "cg",
    "lissa",
    "lissa_h",
    "ekfac_matched",
    "mirrored",
    "unrolled",
)
"""Names of the estimators that run if a spec names none, cheapest first; under Adam Grad-Dot in its scale too."""

IN_SCALE = {"name": "grad_dot", "preconditioner": "optimizer"}


def parse(entry: str | Mapping[str, Any]) -> list[Estimator]:
    """The estimators of one entry of a spec's ``estimators``; a list-valued hyper-parameter sweeps.

    Raises:
        UsageError: see ``fimo.estimators.entries.parse_entry``.
    """
    return parse_entry(REGISTRY, entry)


def choose(problem: Problem) -> tuple[list[Estimator], list[tuple[str, str]]]:
    """The estimators that run if a spec names none, and the others of ``DEFAULTS`` as (name, why not)."""
    chosen, others = [], []
    settings = problem.further_training
    entries: list[str | dict[str, str]] = list(DEFAULTS)
    if settings is not None and not linear(settings.optimizer):
        entries.insert(1, IN_SCALE)
    for entry in entries:
        for estimator in parse(entry):
            reason = estimator.refuses(problem)
            if reason is None:
                chosen.append(estimator)
            else:
                others.append((estimator.name, reason))
    return chosen, others


def defaults(problem: Problem) -> list[Estimator]:
    """The estimators that run if a spec names none: of ``DEFAULTS``, those that apply to the problem."""
    return choose(problem)[0]


def left_out(problem: Problem) -> list[tuple[str, str]]:
    """(name, why not) of the ``DEFAULTS`` that do not apply to the problem."""
    return choose(problem)[1]
