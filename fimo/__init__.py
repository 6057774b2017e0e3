"""fimo: the further-training gold standard of training-data attribution, for notebooks and scripts.

The names below are imported when they are first asked for, so that ``import fimo`` needs neither torch nor Ray. The
number itself is defined in ``fimo.workers.definition``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fimo import plot as plot
    from fimo.orchestrator.notebook import load_spec as load_spec
    from fimo.orchestrator.notebook import open_sweep as open_sweep
    from fimo.orchestrator.notebook import run as run
    from fimo.orchestrator.tables.audit import audit as audit
    from fimo.workers.converters import from_kronfluence as from_kronfluence
    from fimo.workers.converters import from_torch_influence as from_torch_influence
    from fimo.workers.definition import attribution as attribution
    from fimo.workers.workload import Workload as Workload

_WHERE = {
    "Workload": "fimo.workers.workload",
    "attribution": "fimo.workers.definition",
    "audit": "fimo.orchestrator.tables.audit",
    "from_kronfluence": "fimo.workers.converters",
    "from_torch_influence": "fimo.workers.converters",
    "load_spec": "fimo.orchestrator.notebook",
    "open_sweep": "fimo.orchestrator.notebook",
    "run": "fimo.orchestrator.notebook",
}

__all__ = [
    "Workload",
    "attribution",
    "audit",
    "from_kronfluence",
    "from_torch_influence",
    "load_spec",
    "open_sweep",
    "plot",
    "run",
]


def __getattr__(name: str) -> Any:
    if name == "plot":
        return importlib.import_module("fimo.plot")
    if name not in _WHERE:
        raise AttributeError(f"module 'fimo' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
