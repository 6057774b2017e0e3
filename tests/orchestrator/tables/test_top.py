"""``fimo top`` against effects written down by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.stats import t as student

from fimo.orchestrator.report.top import named, top_json, top_lines
from fimo.orchestrator.tables import schemas
from fimo.orchestrator.tables.top import top
from fimo.workers.errors import UsageError

SEEDS = 6
EFFECTS = {0: 0.5, 1: -0.25, 2: 1e-9, 3: 0.125, 4: -0.75}
P = {0: 1e-6, 1: 1e-4, 2: 0.9, 3: 0.04, 4: 1e-8}


def tables(labels: bool = True):
    attribution, of_g = [], []
    for number in range(3):
        for step in (8, 24):
            of_g.append((number, step, 0.01 * step, 0.001, SEEDS, 2.0 + number))
            for removal, effect in EFFECTS.items():
                value = effect * (1 + number) * step / 24
                attribution.append((removal, number, step, value, 0.01, P[removal], SEEDS, 0.0, removal == 2))
    removals = [
        (r, f"r{r}", [r, 10 + r], [f"id-{r}", f"id-{10 + r}"] if labels else None, ["a text", "b"] if labels else None)
        for r in EFFECTS
    ]
    plain = {
        "attribution": schemas.from_rows(schemas.ATTRIBUTION, attribution),
        "training_only": schemas.from_rows(schemas.TRAINING_ONLY, of_g),
        "removals": schemas.from_rows(schemas.REMOVALS, removals),
    }
    return schemas.published(plain, 8, {"sweep": "s"})


def test_effects_of_one_example_at_the_last_step_helpful_first():
    found = top(tables(), 1)
    assert (found.step, found.epoch, found.at_final, found.training_only) == (24, 3.0, 3.0, 0.24)
    assert [e.removal for e in found.effects] == [0, 3, 2, 1, 4]
    helpful, harmful = found.shown(2)
    assert [e.removal for e in helpful] == [0, 3]
    assert [e.removal for e in harmful] == [4, 1], "the most harmful first"
    assert all(e.helpful for e in helpful)
    first = helpful[0]
    assert first.relative == pytest.approx(2 * 0.5 / 3.0)
    half = student.ppf(0.975, SEEDS - 1) * 0.01
    assert (first.low, first.high) == pytest.approx((1.0 - half, 1.0 + half))


def test_told_from_zero_controls_false_discoveries_and_never_counts_what_is_under_the_floor():
    told = {e.removal: e.told for e in top(tables(), 0).effects}
    # Benjamini and Hochberg over 5: .04 · 5/4 = .05.
    assert told == {0: True, 1: True, 2: False, 3: True, 4: True}
    of = tables()
    rows = of["attribution"].to_pylist()
    for r in rows:
        r["p"] = 0.045 if r["removal"] == 3 else r["p"]
    of["attribution"] = of["attribution"].from_pylist(rows, schema=of["attribution"].schema)
    assert not {e.removal: e.told for e in top(of, 0).effects}[3], "significant alone, and not among five"


def test_a_removal_leads_back_to_the_user_s_rows():
    effect = top(tables(), 0).effects[0]
    assert named(effect) == "r0 (2 examples: id-0, id-10)", "one member's label is not the group's"
    assert named(top(tables(labels=False), 0).effects[0]) == "r0 (2 examples: 0, 10)"
    alone = dataclasses.replace(effect, indices=(4,), ids=("id-4",), labels=("a text",))
    assert named(alone) == "r0 (id-4): a text"
    assert named(dataclasses.replace(alone, name="4", ids=None, labels=None)) == "4"
    assert len(named(dataclasses.replace(effect, ids=("x" * 90,) * 5))) < 80
    assert top_json(top(tables(), 0, 8), 1)["helpful"][0]["ids"] == ("id-0", "id-10")
    assert "g is 2 at the final model" in top_lines(top(tables(), 0))[0]


def test_what_is_not_there_is_told():
    with pytest.raises(UsageError, match="examples 0 to 2"):
        top(tables(), 7)
    with pytest.raises(UsageError, match="the sweep has 8, 24"):
        top(tables(), 0, 9)
    empty = {name: table.schema.empty_table() for name, table in tables().items()}
    with pytest.raises(UsageError, match="nothing is trained yet"):
        top(empty, 0)


def test_one_seed_has_no_interval():
    of = tables()
    rows = [{**r, "sem": None, "p": None, "seeds": 1} for r in of["attribution"].to_pylist()]
    of["attribution"] = of["attribution"].from_pylist(rows, schema=of["attribution"].schema)
    found = top(of, 0)
    assert {(e.low, e.high, e.told) for e in found.effects} == {(None, None, None)}
    assert np.isfinite([e.effect for e in found.effects]).all()
    assert "1 seed, so that no effect has an interval" in top_lines(found)[1]
