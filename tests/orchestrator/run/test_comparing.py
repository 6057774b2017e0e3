"""``fimo compare`` on small sweeps: what they have in common, and agreement against plain arithmetic on tables."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest

from fimo.orchestrator.run.comparing import compare_sweeps, paired_steps
from fimo.orchestrator.store import Store
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables import schemas
from fimo.workers.errors import UsageError
from tests.support.small_sweep import OWN, copied, make_spec, run_here

REWEIGHT = {"removal_mode": "reweight"}


@cache
def unchanged() -> Store:
    return run_here(make_spec(estimators=[]), OWN)[1]


def swept(beside, **changes) -> Sweep:
    """The small sweep, or a changed one; the test may write into it."""
    store = run_here(make_spec(estimators=[], **changes), beside)[1] if changes else copied(unchanged())
    return Sweep(store, "flowers")


def effects(sweep) -> np.ndarray:
    """Mean effects (removals, evals, steps) as the sweep's own table has them."""
    table = schemas.decode_table(sweep.store.get(keys.table("flowers", "attribution")), "attribution").to_pandas()
    shape = [table[name].nunique() for name in ("removal", "eval", "step")]
    return table["effect"].to_numpy().reshape(shape)


def rows(comparison) -> dict:
    return {(r["metric"], r["adjust"], r["step"]): r for r in comparison.table.to_pylist()}


def cosines(a, b) -> np.ndarray:
    return (a * b).sum(axis=0) / np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))


def test_a_sweep_and_itself_agree_wholly(beside):
    sweep = swept(beside)
    found = compare_sweeps(sweep, sweep)
    assert found.complete
    assert found.differences == {}
    assert (found.removals, found.evals) == (5, 7)
    assert [r["score"] for r in rows(found).values()] == pytest.approx([1.0] * found.table.num_rows, abs=1e-12)
    assert {r["step"] for r in rows(found).values()} == {3, 6, 9, 10}


def test_modes_in_other_order_and_number_of_removals_and_evals_are_matched_by_what_they_leave_out(beside):
    drop = swept(beside)
    other = swept(
        beside,
        removals={"groups": {"x": [22], "pair": [1, 2], "y": [5], "again": [5], "z": [0]}},
        further_training=REWEIGHT,
        evals=4,
        seeds={"first": 2, "count": 5},
    )
    found = compare_sweeps(drop, other)
    # 0, 5 and 22 are the first sweep's removals 0, 2 and 4, and the second's 4, 2 and 0.
    a, b = effects(drop)[[0, 2, 4], :4], effects(other)[[4, 2, 0]]
    assert (found.removals, found.evals) == (3, 4)
    for place, step in enumerate((3, 6, 9, 10)):
        row = rows(found)["cosine", "baseline", step]
        assert row["score"] == pytest.approx(cosines(a, b)[:, place].mean(), abs=1e-12)
        assert (row["removals"], row["evals"] + row["undefined"], row["seeds"], row["other_seeds"]) == (3, 4, 4, 5)
        centred = cosines(a - a.mean(axis=0), b - b.mean(axis=0))[:, place].mean()
        assert rows(found)["cosine", "mean", step]["score"] == pytest.approx(centred, abs=1e-12)
    assert found.differences == {
        "seeds.first": (0, 2),
        "seeds.count": (4, 5),
        "further_training.removal_mode": ("drop", "reweight"),
    }
    assert any("2 seeds are common" in line for line in found.notes)
    turned = rows(compare_sweeps(other, drop))
    for key, row in rows(found).items():
        assert turned[key]["score"] == pytest.approx(row["score"], abs=1e-12)
        for own, others in (("ceiling", "other_ceiling"), ("seeds", "other_seeds"), ("normalised", "normalised")):
            assert turned[key][others] == (None if row[own] is None else pytest.approx(row[own], abs=1e-12))


def test_float32_against_float64_agrees_to_rounding(beside):
    narrow = swept(beside, further_training=REWEIGHT, seeds=6)
    wide = swept(beside, further_training={**REWEIGHT, "precision": "float64"}, seeds=6)
    found = rows(compare_sweeps(narrow, wide))
    for (metric, _, _), row in found.items():
        assert row["score"] > (0.9999 if metric == "cosine" else 0.95)
        # The same seeds: all but rounding of the noise is common, and the truths are one.
        if metric == "cosine":
            assert row["normalised"] == pytest.approx(1, abs=0.02)
            assert row["score"] > row["joint_ceiling"]


@pytest.mark.slow
def test_reweight_and_drop_agree_to_what_their_noise_allows(beside):
    drop = swept(beside, seeds=40, further_training={"removal_mode": "drop", "epochs": 4})
    reweight = swept(beside, seeds={"first": 100, "count": 10}, further_training={**REWEIGHT, "epochs": 4})
    row = rows(compare_sweeps(drop, reweight))["cosine", "baseline", 20]
    assert row["shared"] == 0
    assert row["ceiling"] < row["other_ceiling"]
    assert row["score"] == pytest.approx(row["joint_ceiling"], abs=0.15)
    assert row["score"] > 0.6


def test_without_a_common_step_the_last_are_compared_and_any_can_be_paired(beside):
    short = swept(beside, further_training={"evaluate": {"at_steps": [2, 7]}, "steps": 8, "epochs": None})
    long = swept(beside, further_training={"batch_size": 6, "evaluate": {"every_epochs": 1}, "epochs": 3})
    assert long.read_manifest().steps == (4, 8, 12)
    found = compare_sweeps(short, long)
    assert {(r["step"], r["other_step"]) for r in found.table.to_pylist()} == {(8, 8)}
    assert any("5 examples in the first sweep and 6 in the second" in line for line in found.notes)
    longer = swept(
        beside, further_training={"batch_size": 6, "evaluate": {"at_steps": [4, 9]}, "steps": 9, "epochs": None}
    )
    found = compare_sweeps(short, longer)
    assert {(r["step"], r["other_step"]) for r in found.table.to_pylist()} == {(8, 9)}
    assert any("no step in common: the last are compared (8 and 9)" in line for line in found.notes)
    found = compare_sweeps(short, longer, [(2, 4), (7, 4), (2, 4)])
    assert [(r["step"], r["other_step"]) for r in found.table.to_pylist()][:2] == [(2, 4), (7, 4)]
    assert found.table.num_rows == 8
    a, b = effects(short)[..., 1], effects(longer)[..., 0]
    assert rows(found)["cosine", "baseline", 7]["score"] == pytest.approx(np.nanmean(cosines(a, b)), abs=1e-12)


def test_steps_are_paired_as_asked_or_refused():
    assert paired_steps((2, 4, 6), (4, 6, 9)) == [(4, 4), (6, 6)]
    assert paired_steps((2, 4), (5, 9)) == [(4, 9)]
    with pytest.raises(UsageError, match=r"second sweep recorded no step 8 \(the nearest is 9, the last 9"):
        paired_steps((2, 4), (5, 9), [(2, 8)])


@pytest.mark.parametrize(
    ("removals", "said"),
    [({"indices": [1, 2]}, r"\(none of 5 and 2\)"), ({"indices": [3, 4]}, r"\(only '3' of 5 and 2\)")],
)
def test_too_few_common_removals_are_refused_in_one_line(beside, removals, said):
    with pytest.raises(UsageError, match=said) as caught:
        compare_sweeps(swept(beside), swept(beside, removals=removals))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"n": 24}, r"different training data \(23 and 24"),
        ({"m": 6}, r"evaluation data \(example 2 is the first of 2 "),
    ],
)
def test_other_data_is_refused_in_one_line(beside, arguments, said):
    with pytest.raises(UsageError, match=said) as caught:
        compare_sweeps(swept(beside), swept(beside, workload_args=arguments))
    assert "\n" not in str(caught.value)


def test_the_same_tensors_under_other_code_are_the_same_data_and_are_told(beside):
    code = "import flowers\n\ndef other():\n    return flowers.flowers()\n"
    (beside / "mine.py").write_text(code)
    found = compare_sweeps(swept(beside), swept(beside, workload="mine:other"))
    assert any("code differs" in line for line in found.notes)
    assert rows(found)["cosine", "baseline", 10]["score"] == pytest.approx(1)


def test_a_manifest_that_does_not_tell_its_data_is_refused_with_the_mend(beside):
    sweep = swept(beside)
    old = json.loads(sweep.store.get("flowers/sweep.json"))
    del old["train_digest"], old["eval_digests"], old["seal"]
    sweep.store.put("flowers/sweep.json", json.dumps(old).encode())
    with pytest.raises(UsageError, match="did not record its data; run its spec again"):
        compare_sweeps(sweep, sweep)


def test_an_incomplete_sweep_is_compared_as_far_as_it_is(beside):
    whole, partial = swept(beside), swept(beside)
    parts = sorted(e.key for e in partial.store.list("flowers/parts/"))
    partial.store.delete(parts[0])
    found = compare_sweeps(whole, partial)
    assert not found.complete
    assert any("of the 20 cells that are compared" in line for line in found.notes)
    assert rows(found)["cosine", "baseline", 10]["removals"] == 5
    # A removal that has no seed at all is compared nowhere; with none left there is nothing to compare.
    manifest = partial.read_manifest()
    for key in parts[1:]:
        if 0 in {r.number for r in partial.read_part(key, manifest).removals}:
            partial.store.delete(key)
    found = compare_sweeps(whole, partial)
    assert {r["removals"] for r in found.table.to_pylist()} == {3}
    assert {r["seeds"] for r in found.table.to_pylist()} == {4}
    assert rows(found)["cosine", "mean", 10]["ceiling"] is not None
    for entry in list(partial.store.list("flowers/parts/")):
        partial.store.delete(entry.key)
    found = compare_sweeps(whole, partial)
    assert (found.table.num_rows, found.complete) == (0, False)


def test_a_torn_part_is_left_out_and_told(beside):
    whole, torn = swept(beside), swept(beside)
    key = next(e.key for e in torn.store.list("flowers/parts/"))
    torn.store.put(key, torn.store.get(key)[:-40])
    found = compare_sweeps(whole, torn)
    assert not found.complete
    assert any(key in line and "left out" in line for line in found.notes)
