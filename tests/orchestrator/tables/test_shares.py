"""A sweep's steps in shares come to the bytes that they come to together."""

from __future__ import annotations

import numpy as np
import pytest

from fimo.orchestrator.tables import groups, shares
from fimo.orchestrator.tables.floor import Pair, measured
from fimo.orchestrator.tables.reduce import Reducer, SeedBlock
from fimo.orchestrator.tables.schemas import encode_table
from fimo.orchestrator.tables.score import Scorer
from fimo.orchestrator.tables.shares import Course, reduced, spans
from tests.orchestrator.tables.test_same_bytes import estimates_of, sweep


def course(r: int, t: int, m: int, seeds: int, witnesses: bool) -> Course:
    random, steps = np.random.default_rng(1), tuple(range(1, t + 1))
    noise = [random.normal(size=(2, t, m)) * 1e-3 for _ in range(4)]
    pairs = [Pair(((0,), (1,)), noise[0], noise[1] + noise[0], noise[2], noise[3], steps)] if witnesses else []
    return Course(tuple(estimates_of(r, steps, m)), steps, r, m, seeds, False, measured(pairs), 8 * r * t * m)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["plain", "ties", "missing", "never", "quantised"])
@pytest.mark.parametrize("shape", [(12, 33, 4, 7), (5, 6, 3, 1), (9, 7, 6, 2)])
def test_shares_of_steps_move_no_bit_however_many(kind, shape, monkeypatch):
    s, r, t, m = shape
    # Five groups of seeds of the whole, and ten of a share, if a share were asked.
    monkeypatch.setattr(groups, "BYTES", 5 * 8 * r * t * m)
    of = course(r, t, m, s, witnesses=kind == "quantised")
    reducer, scorer = Reducer(r, t, m, of.rounding), Scorer(of.estimates, of.steps, s)
    for block in blocks_of(kind, shape):
        reducer.add(block)
        scorer.add(block, reducer.reduction.floor)
    together = reducer.reduction
    scorer.finish(together)
    tables = [encode_table(table) for table in (scorer.table(), scorer.reliability_table())]
    for at_once in (1, 8 * r * m * 2, 2**40):
        monkeypatch.setattr(shares, "TOGETHER", at_once)
        found = reduced(blocks_of(kind, shape), of)
        apart = found.reduction
        assert [encode_table(table) for table in found.tables()] == tables
        for name in ("effects", "centred", "shift", "training_only", "distance"):
            for field in ("count", "mean", "m2"):
                one, other = (getattr(getattr(of, name), field) for of in (apart, together))
                assert np.array_equal(one, other, equal_nan=True), (name, field)
        spread = [of.joint.spread(of.effects) for of in (apart, together)]
        assert np.array_equal(*spread, equal_nan=True)
        assert np.array_equal(apart.floors.of_mean(s), together.floors.of_mean(s))
        assert apart.exploded.tolist() == together.exploded.tolist()


def blocks_of(kind: str, shape: tuple[int, int, int, int]) -> list[SeedBlock]:
    """Those of ``test_same_bytes``; or one removal has no result at the last step, with whatever seed."""
    blocks = sweep("plain" if kind == "never" else kind, *shape)
    for block in blocks if kind == "never" else ():
        block.effects[1, -1] = np.nan
    return blocks


def test_steps_are_shared_out_evenly_and_those_of_one_evaluation_example_stay_together():
    assert [(span.start, span.stop) for span in spans(course(3, 7, 4, 2, False), 3)] == [(0, 2), (2, 4), (4, 7)]
    assert len(spans(course(3, 2, 4, 2, False), 5)) == 2
    assert len(spans(course(3, 7, 1, 2, False), 3)) == 1
