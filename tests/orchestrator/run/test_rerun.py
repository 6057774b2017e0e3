"""Which shards a part says that it was trained with, for which nobody vouches; models that no stack takes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fimo.orchestrator.resolve.at_hand import Own
from fimo.orchestrator.run import rerun
from fimo.orchestrator.run.verification import verify
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.store import MemoryStore
from fimo.orchestrator.sweep.keys import set_hash
from fimo.orchestrator.sweep.sweep import Sweep
from tests.support.small_sweep import make_spec, run_here

MINE, OTHERS = (NamedRemoval(0, "0", (0,)), NamedRemoval(1, "1", (4, 7))), (NamedRemoval(2, "2", (3,)),)
NAME, OTHER = set_hash(MINE), set_hash(OTHERS)


@pytest.fixture
def sweep() -> Sweep:
    sweep = Sweep(MemoryStore(), "flowers")
    for removals in (MINE, OTHERS):
        sweep.write_set("d" * 64, removals)
    # As another process reads it.
    return Sweep(sweep.store, "flowers")


def mates(sweep: Sweep, provenance: dict[str, Any]) -> Any:
    part: Any = SimpleNamespace(seed=5, removals=MINE, provenance=provenance)
    of: Any = SimpleNamespace(digest="d" * 64)
    return rerun._mates(sweep, of, part)


def test_a_part_that_names_none_was_trained_by_itself(sweep: Sweep) -> None:
    assert mates(sweep, {}) == ([([(0,), (4, 7)], 5)], 0)


def test_those_that_it_names_are_found_in_their_order(sweep: Sweep) -> None:
    found = mates(sweep, {"together": [[4, OTHER], [5, NAME], [6, NAME]]})
    assert found == ([([(3,)], 4), ([(0,), (4, 7)], 5), ([(0,), (4, 7)], 6)], 1)


def test_its_own_removals_are_known_from_the_part_itself() -> None:
    lost = Sweep(MemoryStore(), "flowers")
    assert mates(lost, {"together": [[4, NAME], [5, NAME]]}) == ([([(0,), (4, 7)], 4), ([(0,), (4, 7)], 5)], 1)
    assert mates(lost, {"together": [[4, OTHER], [5, NAME]]}) is None


@pytest.mark.parametrize(
    "named",
    [
        "all",
        7,
        {},
        [],
        [[4, NAME]],
        [[5, NAME], [6]],
        [[5, NAME], 6],
        [[5, NAME], ["6", NAME]],
        [[5, NAME], [-1, NAME]],
        [[5, NAME], [2**70, NAME]],
        [[5, NAME], [6, "../../sweep"]],
        [[5, NAME], [6, "0" * 16]],
        [[5, NAME], [6, None]],
        [[5, NAME], *([6, NAME] for _ in range(100_000))],
    ],
    ids=lambda named: str(named)[:30],
)
def test_what_cannot_be_told_is_no_error_and_nothing_that_is_trained(sweep: Sweep, named: Any) -> None:
    assert mates(sweep, {"together": named}) is None


BRANCHES = """
class Branches(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if float(x.sum() + self[0].weight.detach().sum()) < 1e9 else x


def branches():
    \"\"\"The forward asks for a number of its parameters, which no stack can give.\"\"\"
    w = flowers()
    return Workload(Branches(*w.model), w.train, w.evals, w.outputs, w.loss)
"""


def test_cells_of_a_model_that_no_stack_takes_are_trained_again_one_at_a_time(beside: Path) -> None:
    module = beside / "flowers.py"
    module.write_text(module.read_text() + BRANCHES)
    few = {"removals": {"indices": [0, 3]}, "seeds": 1, "estimators": []}
    spec = make_spec(workload="flowers:branches", further_training={"epochs": 1}, **few)
    report, store, _ = run_here(spec, beside)
    assert report.exit_code == 0
    found = verify(Sweep(store, "flowers"), rerun=1, own=Own(beside))
    assert [(r.exact, r.ok) for r in found.reruns] == [(False, True)]
    assert found.exit_code == 0
