"""What `make quick` leaves out, in one place: modules and tests that take too long for it are marked ``long``."""

from __future__ import annotations

import os

import pytest

# A developer's own default store is no test's: not in this process, and not in those that it starts.
os.environ.pop("FIMO_STORE", None)

LONG = (
    "tests/estimators/test_ekfac.py",
    "tests/estimators/test_influence.py",
    "tests/estimators/test_groups.py",
    "tests/estimators/test_signs_and_limits.py",
    "tests/estimators/test_transformers.py",
    "tests/estimators/test_unrolled.py",
    "tests/estimators/test_unusual_models.py",
    "tests/faults/",
    "tests/orchestrator/cluster/test_hostile.py",
    "tests/orchestrator/commands/test_compare.py",
    "tests/orchestrator/commands/test_list.py",
    "tests/orchestrator/commands/test_places.py",
    "tests/orchestrator/commands/test_printing.py",
    "tests/orchestrator/commands/test_remove.py",
    "tests/orchestrator/report/test_progress.py",
    "tests/orchestrator/resolve/test_resolved.py",
    "tests/orchestrator/run/test_comparing.py",
    "tests/orchestrator/run/test_driver.py",
    "tests/orchestrator/run/test_failures.py",
    "tests/orchestrator/run/test_groups.py",
    "tests/orchestrator/sweep/test_imported.py",
    "tests/orchestrator/sweep/test_keys.py",
    "tests/orchestrator/test_notebook.py",
    "tests/orchestrator/test_users_modules.py",
    "tests/test_readme.py::test_the_own_sweep",
    "tests/workers/stacking/test_forking.py",
    "tests/workers/stacking/test_replay.py",
    "tests/workers/stacking/test_text.py",
    "tests/workers/test_bert.py",
    "tests/workers/test_concrete.py",
    "tests/workers/test_holes.py",
    "tests/workers/test_proof.py",
    "tests/workers/test_shard.py",
    "tests/workers/workloads/test_cifar10.py",
    "tests/workers/workloads/test_recipe.py",
    "tests/workers/workloads/test_tabular.py",
)
"""How the ids of long tests begin."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them."""
    for item in items:
        if item.nodeid.startswith(LONG):
            item.add_marker(pytest.mark.long)
