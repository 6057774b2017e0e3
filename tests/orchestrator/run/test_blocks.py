"""Blocks of estimates that a store has beside those of the sweep."""

from __future__ import annotations

from pathlib import Path

from tests.support.small_sweep import make_spec, run_here, table_bytes


def test_estimates_of_removals_that_the_spec_had_before_are_in_no_table(beside: Path) -> None:
    spec = make_spec(estimators=["grad_dot", {"name": "unrolled", "seeds": 1}], seeds=2)
    _, alone, _ = run_here(spec, beside)
    earlier = spec.model_copy(update={"removals": make_spec(removals={"indices": [1, 2]}).removals})
    _, store, _ = run_here(earlier, beside)
    report, _, _ = run_here(spec, beside, store)
    assert report.exit_code == 0
    assert table_bytes(store) == table_bytes(alone)
