"""Gradient estimators of the further-training gold standard, a file each over shared operators.

Pure torch: no Ray, no I/O. A spec's entry becomes estimators by ``parse``; each estimates a ``Problem``. The names
below are imported when they are first asked for: ``fimo.estimators.declared``, which says what values depend on, needs
no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fimo.estimators.base import Estimator as Estimator
    from fimo.estimators.operators.kronecker import coverage as coverage
    from fimo.estimators.problem import Estimate as Estimate
    from fimo.estimators.problem import Problem as Problem
    from fimo.estimators.registry import DEFAULTS as DEFAULTS
    from fimo.estimators.registry import REGISTRY as REGISTRY
    from fimo.estimators.registry import choose as choose
    from fimo.estimators.registry import defaults as defaults
    from fimo.estimators.registry import left_out as left_out
    from fimo.estimators.registry import parse as parse

_WHERE = {
    "DEFAULTS": "fimo.estimators.registry",
    "Estimate": "fimo.estimators.base",
    "Estimator": "fimo.estimators.base",
    "Problem": "fimo.estimators.base",
    "REGISTRY": "fimo.estimators.registry",
    "choose": "fimo.estimators.registry",
    "coverage": "fimo.estimators.operators.kronecker",
    "defaults": "fimo.estimators.registry",
    "left_out": "fimo.estimators.registry",
    "parse": "fimo.estimators.registry",
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fimo.estimators' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)
