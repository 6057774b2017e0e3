"""A sweep that trains a part of the model: its own identity, its own estimates, and the truth of both."""

from __future__ import annotations

import numpy as np
import pytest

from fimo.orchestrator.resolve import identity
from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.spec.spec import parse
from fimo.workers.definition import attribution
from fimo.workers.errors import UsageError
from tests.orchestrator.run.test_driver import table
from tests.support.small_sweep import SPEC, make_spec, run_here

LAST = {"trainable": ["2.*"]}
ADAPTERS = {"lora": {"rank": 2, "targets": ["0", "2"]}}


def test_what_is_trained_is_part_of_every_number_and_its_default_of_none(beside) -> None:
    whole, last, adapted = (resolve(make_spec(further_training=part), beside).manifest for part in ({}, LAST, ADAPTERS))
    assert len({m.digest for m in (whole, last, adapted)}) == 3
    assert len({m.estimate_digest for m in (whole, last, adapted)}) == 3, "gradients are of what is trained"
    spelt = make_spec(further_training={"trainable": "all", "lora": None})
    assert resolve(spelt, beside).manifest.digest == whole.digest
    assert not {"trainable", "lora"} & set(identity.training_identity(spelt.further_training)), "older parts stay"
    assert last.scalars < whole.scalars


@pytest.mark.parametrize("part", [LAST, ADAPTERS])
def test_a_sweep_gives_the_definitions_attribution(part, beside) -> None:
    pytest.importorskip("peft")
    spec = make_spec(further_training={**part, "precision": "float64"}, estimators=["grad_dot"])
    report, store, _ = run_here(spec, beside)
    assert report.complete
    resolved = resolve(spec, beside)
    removals = [list(r.indices) for r in resolved.manifest.removals]
    expected = attribution(resolved.workload, spec.further_training.settings(), removals, range(4))
    frame = table(store, "attribution").to_pandas()
    for removal in range(len(removals)):
        for place, step in enumerate(expected.steps):
            rows = frame.query(f"removal == {removal} and step == {step}").sort_values("eval")
            np.testing.assert_allclose(rows["effect"], expected.effect[removal, place], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ({"trainable": []}, "'further_training.trainable'"),
        ({"trainable": "some"}, "'further_training.trainable'"),
        ({"lora": {"rank": 0, "targets": ["0"]}}, "'further_training.lora.rank'"),
        (
            {"lora": {"rank": 2, "target": ["0"]}},
            "unknown key 'further_training.lora.target' (did you mean 'targets'?)",
        ),
    ],
)
def test_mistakes_are_one_line(part, line) -> None:
    with pytest.raises(UsageError) as caught:
        parse({**SPEC, "further_training": {**SPEC["further_training"], **part}})
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
