"""A sweep of a removal weight: parts as trained, every number made of them divided by it, its own identity."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from fimo.orchestrator.report.planned import plan_lines
from fimo.orchestrator.report.scores import score_tables
from fimo.orchestrator.resolve import identity
from fimo.orchestrator.resolve.at_hand import Own
from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.run.comparing import compare_sweeps
from fimo.orchestrator.run.ranking import measured
from fimo.orchestrator.run.verification import verify
from fimo.orchestrator.sweep import parts
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.definition import attribution
from fimo.workers.errors import UsageError
from tests.orchestrator.run.test_driver import table
from tests.support.small_sweep import OWN, make_spec, run_here

SECTION = {"removal_mode": "reweight", "precision": "float64"}


def section(weight: float | None, **more):
    return {**SECTION, **({} if weight is None else {"removal_weight": weight}), **more}


def part_keys(store) -> list[str]:
    return [e.key for e in store.list("flowers/parts/") if e.key.endswith(".parquet")]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    beside = tmp_path_factory.mktemp("swept") / "spec"
    shutil.copytree(OWN, beside)
    spec = make_spec(further_training=section(6.0), estimators=["grad_dot", "unrolled"], seeds=3)
    report, store, _ = run_here(spec, beside)
    assert report.complete
    return spec, store


def test_the_default_weight_has_the_digest_of_no_weight_and_another_its_own(beside) -> None:
    absent, one, integer, two = (
        resolve(make_spec(further_training=section(w)), beside).manifest for w in (None, 1.0, 1, 2.0)
    )
    assert absent.digest == one.digest == integer.digest != two.digest
    assert "removal_weight" not in identity.training_identity(one.spec.further_training), "older parts stay"
    assert absent.estimate_digest == two.estimate_digest, "gradients at the final model know of no weight"


def test_attributions_are_effects_of_a_unit_of_weight_and_parts_are_as_trained(swept, beside) -> None:
    spec, store = swept
    resolved = resolve(spec, beside)
    removals = [list(r.indices) for r in resolved.manifest.removals]
    settings = spec.further_training.settings()
    expected = attribution(resolved.workload, settings, removals, range(3))
    frame, only = table(store, "attribution").to_pandas(), table(store, "training_only").to_pandas()
    for place, step in enumerate(expected.steps):
        for removal in range(len(removals)):
            rows = frame.query(f"removal == {removal} and step == {step}").sort_values("eval")
            np.testing.assert_allclose(rows["effect"], expected.effect[removal, place], rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(rows["sem"], expected.sem[removal, place], rtol=1e-8, atol=1e-12)
        rows = only.query(f"step == {step}").sort_values("eval")
        np.testing.assert_allclose(rows["delta"], expected.training_only.mean(dim=0)[place], rtol=1e-9)
    raw = [parts.decode_part(store.get(key), key) for key in part_keys(store)]
    assert {part.provenance["removal_weight"] for part in raw} == {6.0}
    first = next(part for part in raw if part.seed == 0 and part.removals[0].indices == (0,))
    np.testing.assert_allclose(first.deltas[0] - first.deltas[-2], 6 * expected.effects[0, 0], rtol=1e-9, atol=1e-12)


def test_the_noise_floor_is_that_of_the_divided_effects_wherever_it_is_told(swept) -> None:
    _, store = swept
    deltas = np.stack([parts.decode_part(store.get(key), key).deltas[-2:] for key in part_keys(store)])
    squares = ((deltas[:, 1] - deltas[:, 0]) / 6.0) ** 2
    assert squares.max() > 0
    rows = table(store, "reliability").to_pandas().query("seeds == 1 and adjust == 'baseline'")
    told = rows.sort_values("step")["noise_floor"].to_numpy()
    np.testing.assert_allclose(told, np.sqrt(squares.mean(axis=(0, 2))), rtol=1e-9)
    [device] = verify(Sweep(store, "flowers")).devices.values()
    np.testing.assert_allclose(device.floor, np.sqrt(squares.mean()), rtol=1e-9)


def test_its_cells_train_again_to_the_same_bits_and_a_ranking_knows_the_divided_effects(swept, beside) -> None:
    spec, store = swept
    sweep = Sweep(store, "flowers")
    manifest = resolve(spec, beside).manifest
    found = verify(sweep, rerun=3, own=Own(beside))
    assert [r.ok for r in found.reruns] == [True] * 3
    step = manifest.steps[-1]
    known, _ = measured(sweep, manifest, step, lambda line: None)
    rows = table(store, "attribution").to_pandas().query(f"removal == 1 and step == {step}").sort_values("eval")
    np.testing.assert_array_equal(known.effect[3], rows["effect"])


def test_two_weights_are_two_measurements_of_nearly_one_effect(swept, beside) -> None:
    _, heavy = swept
    report, light, _ = run_here(make_spec(further_training=section(None), estimators=[], seeds=3), beside)
    assert report.complete
    sizes = [table(store, "attribution").to_pandas()["effect"].abs().mean() for store in (light, heavy)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.3)
    found = compare_sweeps(Sweep(light, "flowers"), Sweep(heavy, "flowers"))
    assert found.differences == {"further_training.removal_weight": (1.0, 6.0)}
    last = found.table.to_pandas().query("metric == 'cosine' and adjust == 'baseline'").iloc[-1]
    assert last["score"] > 0.9
    scores = table(heavy, "scores").to_pandas().query("estimator == 'unrolled' and metric == 'cosine'")
    assert scores["score"].min() > 0.8


def test_the_weight_is_named_where_it_is_not_1(swept, beside) -> None:
    _, store = swept
    tables = table(store, "scores"), table(store, "costs")
    assert "further training at removal weight 6, 3 seeds" in str(score_tables(*tables, weight=6.0)[0].title)
    assert "weight" not in str(score_tables(*tables)[0].title)
    from fimo.orchestrator.commands.plan import _plan_json
    from fimo.orchestrator.run.owed import current_plan

    for weight, said in ((6.0, "removal mode reweight at weight 6"), (None, "removal mode reweight")):
        resolved = resolve(make_spec(further_training=section(weight)), beside)
        lines = plan_lines({**_plan_json(resolved, current_plan(resolved.manifest, None)), "unused": {}})
        assert any(line.endswith(said) for line in lines)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"removal_weight": 0}, "'further_training.removal_weight'"),
        ({"removal_weight": -2.0}, "'further_training.removal_weight'"),
        ({"removal_weight": float("inf")}, "'further_training.removal_weight'"),
        ({"removal_weight": "heavy"}, "'further_training.removal_weight'"),
        ({"removal_weigh": 2.0}, "did you mean 'removal_weight'?"),
        ({"removal_mode": "drop", "removal_weight": 2.0}, "removal_mode drop takes an example out whole"),
        ({"removal_mode": "mask", "removal_weight": 2.0}, "use removal_mode: reweight"),
    ],
)
def test_what_is_no_weight_is_refused_in_one_line(given, line) -> None:
    with pytest.raises(UsageError) as caught:
        make_spec(further_training={**SECTION, **given})
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
