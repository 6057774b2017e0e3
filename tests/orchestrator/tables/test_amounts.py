"""Which amount of further training to take: figures from tables, metasmoothness, linearity, and the recommendation."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from fimo.orchestrator.tables import schemas
from fimo.orchestrator.tables.advice import advise, faults
from fimo.orchestrator.tables.amounts import (
    Amount,
    Linear,
    amounts,
    compared,
    finite_steps,
    limit_of,
    linearity,
    metasmoothness,
    share,
    thinned,
)

GOOD = Amount(1, 4, 0.9, 0.95, 0.1, 0.01, 0.1, False, 0.0, 0.8, 0.95, 0.95, 0.97, 0.99, (), None)


def series(**changes):
    """Five good amounts, some of their fields changed: name -> values by place."""
    out = [replace(GOOD, step=step) for step in (2, 8, 24, 64, 120)]
    for name, values in changes.items():
        out = [replace(a, **{name: value}) for a, value in zip(out, values, strict=True)]
    return out


def test_metasmoothness_is_the_plain_sum_of_its_definition():
    rng = np.random.default_rng(0)
    f0, f1, f2 = rng.normal(size=(3, 6, 9))
    expected = []
    for a, b, c in zip(f0, f1, f2, strict=True):
        d = [abs(z - x) for x, z in zip(a, c, strict=True)]
        signs = [np.sign(y - x) * np.sign(z - y) for x, y, z in zip(a, b, c, strict=True)]
        expected.append(sum(w * s for w, s in zip(d, signs, strict=True)) / sum(d))
    np.testing.assert_allclose(metasmoothness(f1 - f0, f2 - f0), expected, rtol=1e-12)


def test_metasmoothness_of_lines_is_1_of_a_turn_is_less_and_of_nothing_unknown():
    one = np.array([1.0, -2.0, 3.0])
    assert metasmoothness(one, 2 * one) == pytest.approx(1)
    assert metasmoothness(one, 0.5 * one) == pytest.approx(-1)
    assert np.isnan(metasmoothness(one, 0 * one))
    assert metasmoothness(one, np.array([2.0, np.nan, 6.0])) == 0
    assert metasmoothness(one, np.array([2.0, -4.0, 1.0])) == pytest.approx((2 + 4 - 1) / 7)


def test_linearity_is_the_cosine_and_size_per_unit_of_weight():
    light = np.array([[1.0, 0.0], [0.0, 2.0]])
    same = linearity(10, 1, 1.05 * light, light)
    assert (same.cosine, same.exact) == (pytest.approx(1), True)
    assert same.size == pytest.approx(1.05)
    turned = linearity(10, 1, light[:, ::-1], light)
    assert (turned.cosine, turned.exact) == (pytest.approx(0), False)
    assert linearity(10, 1, 1.2 * light, light).exact is False
    for broken in (np.full((2, 2), np.nan), np.zeros((2, 2))):
        assert linearity(10, 1, broken, light) == Linear(10, 1, None, None)


def test_many_recorded_steps_are_thinned_on_a_log_scale():
    assert thinned([3, 6, 9]) == [3, 6, 9]
    few = thinned(range(8, 4001, 8), 12)
    assert (few[0], few[-1], len(few)) == (8, 4000, 12)
    assert max(b / a for a, b in pairwise(few)) < 2.1


def tables(moves=(0.1, 0.2), counts=(4, 4), reliability=(0.9, 0.3)):
    """Two steps, 3 removals, 2 evaluation examples."""
    rows = [
        (r, e, s, 1.0, 0.1, 0.01, counts[p], 0.0, r == 0)
        for p, s in enumerate((5, 50))
        for r in range(3)
        for e in (0, 1)
    ]
    trust = []
    for step, rho in zip((5, 50), reliability, strict=True):
        for k in (1, 4, 10, 100):
            extrapolated = rho * k / (rho * k + (1 - rho) * 4)
            trust += [
                (step, a, k, k == 4, extrapolated if a == "baseline" else 0.0, 0.9, 0.0, 0.5, None, None)
                for a in ("baseline", "mean")
            ]
    return {
        "attribution": schemas.from_rows(schemas.ATTRIBUTION, [row for row in rows if row[6]]),
        "training_only": schemas.from_rows(
            schemas.TRAINING_ONLY,
            [(e, s, sign * moves[p], 0.0, 4, None) for p, s in enumerate((5, 50)) for e, sign in ((0, 1), (1, -1))],
        ),
        "reliability": schemas.from_rows(schemas.RELIABILITY, trust),
    }


def test_figures_come_from_the_sweep_s_own_tables():
    early, late = amounts(tables(), (5, 50), {5: 1.5}, 0.5, 0.5)
    assert (early.step, early.seeds, early.reliability, early.significant) == (5, 4, 0.9, 0.5)
    assert (early.distance, late.distance) == (1.5, None)
    assert (early.moved, early.relative) == (pytest.approx(0.1), pytest.approx(0.2))
    assert early.under_floor == pytest.approx(1 / 3)
    assert (early.enough, late.enough) == (None, 10)
    assert (early.exploded, late.exploded) == (False, False)


def test_an_amount_has_exploded_if_g_is_beyond_reason_or_a_run_is_not_finite_or_it_leads_there():
    def exploded(**given):
        return [a.exploded for a in amounts(tables(**given), (5, 50), {}, 0.5, 0.5)]

    assert exploded(moves=(0.1, 51.0)) == [False, True]
    assert exploded(moves=(0.6, 51.0)) == [True, True]
    assert exploded(moves=(0.6, 0.7)) == [False, False]
    assert exploded(counts=(4, 3)) == [False, True]
    assert exploded(counts=(4, 0)) == [False, True]
    assert finite_steps(tables(counts=(0, 0))["attribution"], (5, 50)) == []


def test_neighbours_and_the_limit_are_put_where_they_belong():
    first, last = compared(series()[:2], {(2, 8): 0.7}, {8: 0.4})
    assert (first.before, first.after, first.first_order) == (None, 0.7, None)
    assert (last.before, last.after, last.first_order) == (0.7, None, 0.4)
    rows = [
        ("grad_dot", "{}", "cosine", adjust, k, 5, 0.5, *[None] * 3, 0.9, n, 7, 0)
        for adjust, k, n in (("baseline", 1, 0.1), ("baseline", 4, 0.6), ("mean", 4, 0.2))
    ]
    assert limit_of(schemas.from_rows(schemas.SCORES, rows), "grad_dot", "{}") == {5: 0.6}
    assert (share(3.7, 0.09), share(0.5, None), share(None, 0.9), share(0.5, 0.55)) == (None, None, None, 0.5)


def test_a_good_series_is_taken_whole_and_first_order_estimators_work():
    found = advise(series())
    assert found.steps == found.first_order == (2, 8, 24, 64, 120)
    assert found.qualified
    assert "take 2 to 120 steps" in found.lines[0]
    assert "first-order estimator can work there" in found.lines[-1]


@pytest.mark.parametrize(
    ("changes", "steps", "word"),
    [
        ({"exploded": (False, False, False, True, True)}, (2, 8, 24), "exploded"),
        ({"under_floor": (0.9, 0.6, 0.1, 0.1, 0.1)}, (24, 64, 120), "under the floor"),
        ({"reliability": (0.9, 0.9, 0.9, 0.4, None)}, (2, 8, 24), "unreliable"),
        ({"before": (None, 0.5, 0.5, 0.95, 0.95), "after": (0.5, 0.5, 0.95, 0.95, None)}, (24, 64, 120), "unstable"),
        ({"metasmoothness": (0.99, 0.9, 0.8, 0.6, 0.1)}, (2, 8, 24), "not metasmooth"),
        ({"metasmoothness": (None,) * 5}, (2, 8, 24, 64, 120), "take 2 to 120"),
    ],
)
def test_each_fault_keeps_an_amount_out_and_is_named(changes, steps, word):
    found = advise(series(**changes))
    assert (found.steps, found.qualified) == (steps, True)
    assert any(word in line for line in found.lines)


def test_first_order_estimators_may_work_in_part_or_nowhere_or_be_unknown():
    part = advise(series(first_order=(0.97, 0.93, 0.5, 0.3, None)))
    assert part.first_order == (2, 8)
    assert "steps 2, 8 alone" in part.lines[-1]
    nowhere = advise(series(first_order=(0.5, 0.4, 0.3, 0.2, 0.1)))
    assert nowhere.first_order == ()
    assert "cannot work there" in nowhere.lines[-1]
    assert "0.50" in nowhere.lines[-1]
    assert advise(series(first_order=(None,) * 5)).first_order is None


def test_nothing_reliable_takes_the_most_reliable_and_says_how_many_seeds_are_enough():
    found = advise(
        series(reliability=(0.2, 0.4, 0.3, 0.1, 0.45), enough=(50, 10, 20, 100, 10), exploded=(False,) * 4 + (True,))
    )
    assert (found.steps, found.qualified) == ((8,), False)
    assert "most reliable is step 8, 0.40" in found.lines[0]
    assert any("10 seeds are enough" in line and "at step 8" in line for line in found.lines)
    assert any("exploded at step 120" in line for line in found.lines)


def test_nothing_to_take_says_what_to_change():
    every = advise(series(exploded=(True,) * 5))
    assert every.steps == ()
    assert "lower the learning rate" in every.lines[1]
    one = advise(series(reliability=(None,) * 5, before=(None,) * 5, after=(None,) * 5))
    assert one.steps == ()
    assert any("more seeds" in line for line in one.lines)
    rough = advise(series(before=(0.1,) * 5, after=(0.1,) * 5))
    assert rough.steps == ()
    assert any("unstable at steps" in line for line in rough.lines)


def test_drowned_effects_are_lifted_by_a_weight_only_if_they_are_linear_in_it():
    def mend(*pairs):
        return next(
            line for line in advise(series(under_floor=(0.9,) * 5, linear=(pairs,) * 5)).lines if "floor" in line
        )

    exact, curved = Linear(10, 1, 0.999, 1.01), Linear(100, 1, 0.9, 3.0)
    assert "float64" in mend()
    assert "removal_weight" not in mend()
    assert "10 times the removal_weight" in mend(exact, curved)
    assert "not removal_weight" in mend(curved)


def test_a_single_amount_has_no_neighbour_to_disagree_with():
    [only] = [replace(GOOD, before=None, after=None)]
    assert faults(only) == ("unstable",)
    found = advise([only])
    assert found.steps == (1,)
    assert any("stability" in line for line in found.lines)


def test_what_is_not_known_of_an_unreliable_amount_is_no_further_fault():
    unknown = replace(GOOD, reliability=0.2, before=None, after=None)
    assert faults(unknown) == ("unreliable",)
    assert faults(replace(unknown, after=0.5)) == ("unreliable", "unstable")
    assert faults(replace(unknown, exploded=True)) == ("exploded",)
