"""The fast arithmetic gives the plain one's tables, byte for byte, whatever the shape, however strange the numbers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import rankdata

from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.tables import moments
from fimo.orchestrator.tables.attributed import attribution_table, training_only_table
from fimo.orchestrator.tables.ordering import ranks, ranks_last
from fimo.orchestrator.tables.reduce import SeedBlock, reduce
from fimo.orchestrator.tables.schemas import encode_table
from fimo.orchestrator.tables.score import EstimateMatrix, Scorer
from tests.support.plain_tables import plainly

SHAPES = ((1, 2, 1, 1), (2, 3, 1, 4), (7, 5, 3, 1), (12, 33, 4, 7), (3, 129, 2, 9), (5, 400, 2, 3), (11, 6, 4, 20))
"""(S, R, T, m): few and many of each, one step, one evaluation example, and more removals than float32 is exact for."""
KINDS = ("plain", "ties", "constant", "missing", "zero", "quantised", "close")


def effects_of(kind: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    effects = random.normal(size=shape)
    if kind == "ties":
        return np.round(effects)
    if kind == "constant":
        effects[:, 0] = 0.25
    if kind == "zero":
        return np.where(random.random(shape) < 0.5, -0.0, 0.0)
    if kind == "quantised":
        return np.float32(1 + effects * 1e-6).astype(float) - 1
    if kind == "close":
        return 1 + np.round(effects * 40) * 2.0**-52
    if kind == "missing":
        effects[random.random(shape[:2]) < 0.2 / shape[0]] = np.nan
    return effects


def sweep(kind: str, s: int, r: int, t: int, m: int) -> list[SeedBlock]:
    random = np.random.default_rng([s, r, t, m])
    common = effects_of("plain", (r, t, m), random) if kind == "plain" else 0.0
    blocks = []
    for seed in range(s):
        effects = effects_of(kind if kind != "missing" or seed % 3 == 1 else "plain", (r, t, m), random) + common
        baseline = random.normal(size=(t, m))
        if kind == "missing" and seed % 4 == 2:
            baseline[t // 2] = np.nan
        floor = np.full((t, m), 1e-20 if kind != "quantised" else 1e-14)
        blocks.append(SeedBlock(seed, effects, baseline, floor, 1, (), 0.5, np.ones(t), np.ones(m)))
    return blocks


def estimates_of(r: int, steps: tuple[int, ...], m: int) -> list[EstimateMatrix]:
    random = np.random.default_rng(3)
    chosen = [None, None, steps, steps, steps[::2], (*steps[-1:], 999), None]
    out = []
    for number, at in enumerate(chosen):
        values = random.normal(size=(r, m) if at is None else (len(at), r, m))
        values = np.round(values) if number in (1, 3) else values
        values[..., 0] = 0.0 if number in (3, 6) else values[..., 0]
        out.append(EstimateMatrix(f"e{number}", "{}", values, at))
    return out


def tables(kind: str, s: int, r: int, t: int, m: int) -> dict[str, bytes]:
    steps = tuple(range(1, t + 1))
    scorer = Scorer(estimates_of(r, steps, m), steps, s, random_groups=kind == "plain")
    blocks, reduction = reduce(iter(sweep(kind, s, r, t, m)), r, t, m)
    for block in blocks:
        scorer.add(block, reduction.floor)
    scorer.finish(reduction)
    removals = [NamedRemoval(i, str(i), (i,)) for i in range(r)]
    found = {
        "attribution": attribution_table(reduction, removals, steps),
        "training_only": training_only_table(reduction, steps),
        "scores": scorer.table(),
        "reliability": scorer.reliability_table(),
    }
    return {name: encode_table(table) for name, table in found.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_every_table_has_the_bytes_of_the_plain_arithmetic(kind, monkeypatch):
    # Few at a time, so that arrays of this size are worked on in several pieces.
    monkeypatch.setattr(moments, "TOGETHER", 100)
    monkeypatch.setattr("fimo.orchestrator.tables.ordering.TOGETHER", 500)
    fast = {shape: tables(kind, *shape) for shape in SHAPES}
    with pytest.MonkeyPatch.context() as patch:
        plainly(patch)
        for shape in SHAPES:
            slow = tables(kind, *shape)
            assert [name for name in slow if slow[name] != fast[shape][name]] == [], shape


@pytest.mark.parametrize("size", [1, 2, 3, 64, 127, 128, 129, 368, 369, 1000])
@pytest.mark.parametrize("kind", [*KINDS, "not finite", "tiny", "huge"])
def test_ranks_are_scipy_s_with_ties_zeros_of_both_signs_and_numbers_a_bit_apart(size, kind):
    a = effects_of(kind, (size, 5, 3), np.random.default_rng(size))
    a = {"tiny": a * 1e-310, "huge": a * 1e300}.get(kind, a)
    if kind == "not finite":
        a[0, 0], a[-1, 1], a[0, 2] = np.nan, np.inf, -np.inf
    expected = rankdata(a, axis=0) - (size + 1) / 2
    assert np.array_equal(ranks(a), expected, equal_nan=True)
    assert np.array_equal(np.moveaxis(ranks_last(a), -1, 0), expected, equal_nan=True)
