from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.sweep.parts import Part
from fimo.orchestrator.tables.attributed import attribution_table, training_only_table
from fimo.orchestrator.tables.reduce import reduce, seed_block

REMOVALS = [NamedRemoval(0, "a", (3,)), NamedRemoval(1, "b", (5,)), NamedRemoval(2, "c", (1, 2))]
STEPS, M = (2, 7), 4


def part(seed: int, removals: list[NamedRemoval], offset: float = 0.0) -> Part:
    rng = np.random.default_rng([seed, *[i for r in removals for i in r.indices]])
    deltas = rng.normal(size=(len(removals) + 2, len(STEPS), M)) + offset
    deltas[-1] = deltas[-2] + 1e-6 * rng.normal(size=deltas[-1].shape)
    return Part("d", seed, tuple(removals), STEPS, deltas, np.ones(deltas.shape[:2]), "rows", {})


def reduced(by_seed: dict[int, list[Part]]):
    blocks = (seed_block(s, parts, REMOVALS, STEPS, M) for s, parts in sorted(by_seed.items()))
    stream, reduction = reduce(blocks, len(REMOVALS), len(STEPS), M)
    list(stream)
    return reduction


def seeds(count: int, offset: float = 0.0) -> dict[int, list[Part]]:
    return {s: [part(s, REMOVALS[:2], offset), part(s, REMOVALS[2:], offset)] for s in range(count)}


def test_attribution_is_the_mean_over_seeds_of_delta_minus_its_own_part_s_baseline():
    parts = seeds(5)
    table = attribution_table(reduced(parts), REMOVALS, STEPS).to_pylist()
    assert [(r["removal"], r["eval"], r["step"]) for r in table] == list(itertools.product(range(3), range(M), STEPS))
    for row in table:
        effects = []
        for first, second in parts.values():
            own, place = (first, row["removal"]) if row["removal"] < 2 else (second, 0)
            t = STEPS.index(row["step"])
            effects.append(own.deltas[place, t, row["eval"]] - own.deltas[-2, t, row["eval"]])
        assert row["effect"] == pytest.approx(np.mean(effects), rel=1e-12)
        assert row["sem"] == pytest.approx(np.std(effects, ddof=1) / np.sqrt(5), rel=1e-12)
        assert row["seeds"] == 5


def test_p_is_scipy_s_t_test_and_spread_the_difference_of_two_variances():
    parts = {s: [part(s, REMOVALS, 3.0)] for s in range(6)}
    for row in attribution_table(reduced(parts), REMOVALS, STEPS).to_pylist():
        t = STEPS.index(row["step"])
        of = np.array([one.deltas[row["removal"], t, row["eval"]] for [one] in parts.values()])
        baseline = np.array([one.deltas[-2, t, row["eval"]] for [one] in parts.values()])
        assert row["p"] == pytest.approx(ttest_1samp(of - baseline, 0).pvalue, rel=1e-9)
        assert row["spread"] == pytest.approx(of.var(ddof=1) - baseline.var(ddof=1), rel=1e-9)
        assert row["under_floor"] is False


def test_with_one_seed_there_is_neither_p_nor_spread_and_what_rounding_does_is_marked():
    parts = seeds(1)
    for part_ in parts[0]:
        part_.deltas[:-2] = part_.deltas[-2] + 1e-9
    for row in attribution_table(reduced(parts), REMOVALS, STEPS).to_pylist():
        assert row["p"] is row["spread"] is row["sem"] is None
        assert row["under_floor"] is True


def test_a_missing_cell_has_the_spread_of_the_seeds_that_it_has():
    parts = {s: [part(s, REMOVALS, 3.0)] for s in range(5)}
    parts[2][0].deltas[1] = np.nan
    row = next(r for r in attribution_table(reduced(parts), REMOVALS, STEPS).to_pylist() if r["removal"] == 1)
    kept = [one for s, [one] in parts.items() if s != 2]
    of, baseline = (np.array([one.deltas[place, 0, 0] for one in kept]) for place in (1, -2))
    assert row["seeds"] == 4
    assert row["spread"] == pytest.approx(of.var(ddof=1) - baseline.var(ddof=1), rel=1e-9)


@pytest.mark.parametrize("weight", [4.0, 0.5])
def test_effects_and_their_noise_are_per_unit_of_weight_and_the_baseline_is_not(weight: float):
    parts = seeds(1)[0]
    plain, divided = (seed_block(0, parts, REMOVALS, STEPS, M, *w) for w in ((), (weight,)))
    np.testing.assert_array_equal(divided.effects, plain.effects / weight)
    np.testing.assert_allclose(divided.floor_squares, plain.floor_squares / weight**2, rtol=1e-12)
    np.testing.assert_array_equal(divided.training_only, plain.training_only)
    assert plain.floor_squares.min() > 0


def test_a_large_common_shift_does_not_spoil_the_moments():
    table = attribution_table(reduced(seeds(6)), REMOVALS, STEPS)
    shifted = attribution_table(reduced(seeds(6, offset=1e6)), REMOVALS, STEPS)
    np.testing.assert_allclose(table["effect"].to_numpy(), shifted["effect"].to_numpy(), atol=1e-9)
    np.testing.assert_allclose(table["sem"].to_numpy(), shifted["sem"].to_numpy(), atol=1e-9)


def test_the_training_only_effect_is_the_baseline_s_mean_delta():
    parts = seeds(4)
    for row in training_only_table(reduced(parts), STEPS).to_pylist():
        t = STEPS.index(row["step"])
        deltas = [np.mean([p.deltas[-2, t, row["eval"]] for p in both]) for both in parts.values()]
        assert row["delta"] == pytest.approx(np.mean(deltas), rel=1e-12)
        assert row["sem"] == pytest.approx(np.std(deltas, ddof=1) / 2, rel=1e-12)


def test_one_seed_has_no_standard_error():
    table = attribution_table(reduced(seeds(1)), REMOVALS, STEPS)
    assert table["sem"].null_count == table.num_rows
    assert set(table["seeds"].to_pylist()) == {1}


def test_a_missing_cell_is_left_out_of_its_own_mean_alone():
    parts = seeds(4)
    parts[2] = parts[2][:1]
    counts = {r["removal"]: r["seeds"] for r in attribution_table(reduced(parts), REMOVALS, STEPS).to_pylist()}
    assert counts == {0: 4, 1: 4, 2: 3}


def test_a_diverged_run_is_reported_and_not_averaged():
    parts = seeds(4)
    parts[1][0].deltas[1, 1, 2] = np.nan
    reduction = reduced(parts)
    assert reduction.diverged == [(1, 1, 7)]
    counts = {(r["removal"], r["step"]): r["seeds"] for r in attribution_table(reduction, REMOVALS, STEPS).to_pylist()}
    assert counts[1, 7] == 3
    assert all(n == 4 for key, n in counts.items() if key != (1, 7))


def test_a_diverged_baseline_takes_its_part_with_it_and_is_reported():
    parts = seeds(3)
    parts[0][0].deltas[-2, 1] = np.nan
    reduction = reduced(parts)
    assert reduction.diverged == [(-1, 0, 7)]
    counts = {(r["removal"], r["step"]): r["seeds"] for r in attribution_table(reduction, REMOVALS, STEPS).to_pylist()}
    assert counts == {(0, 2): 3, (0, 7): 2, (1, 2): 3, (1, 7): 2, (2, 2): 3, (2, 7): 3}


def test_cells_are_matched_by_their_indices_not_by_the_numbers_they_had():
    block = seed_block(0, [part(0, [NamedRemoval(9, "old name", (5,))])], REMOVALS, STEPS, M)
    assert np.isfinite(block.effects[1]).all()
    assert np.isnan(block.effects[[0, 2]]).all()


def test_the_noise_floor_is_the_root_mean_square_difference_of_the_two_baselines():
    parts = seeds(3)
    squares = [(p.deltas[-1] - p.deltas[-2]) ** 2 for both in parts.values() for p in both]
    np.testing.assert_allclose(reduced(parts).floor, np.sqrt(np.mean(squares, axis=0)), rtol=1e-12)
