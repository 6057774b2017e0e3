"""The spec's reference and schema: what they say is what the validator does."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from fimo.orchestrator.report import reference
from fimo.orchestrator.spec.schema import WORDS
from fimo.orchestrator.spec.shipped import SHIPPED
from fimo.orchestrator.spec.spec import parse
from fimo.orchestrator.spec.yaml import read_yaml
from fimo.workers.errors import UsageError
from tests.support.small_sweep import SPEC

ROOT = Path(__file__).parents[3]
SCHEMA = json.loads((ROOT / reference.SCHEMA).read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
SPECS = sorted([*ROOT.glob("examples/**/*.yaml"), *ROOT.glob("orchestrator/starters/*.yaml")])
AGAIN = "out of date: run `.venv/bin/python -m fimo.orchestrator.report.reference`"


def test_the_page_and_the_schema_are_those_of_the_models():
    assert (ROOT / reference.PAGE).read_text(encoding="utf-8") == reference.page(), AGAIN
    assert (ROOT / reference.SCHEMA).read_text(encoding="utf-8") == reference.schema_text(), AGAIN


def test_the_page_has_every_key_and_every_key_a_meaning():
    page = reference.page()
    sections = [SCHEMA, *SCHEMA["$defs"].values()]
    assert len(sections) == 12
    for section in sections:
        for name, key in section["properties"].items():
            assert len(key["description"]) >= 5, name
            assert f"| `{name}` |" in page, name


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_spec_that_ships_is_accepted(path):
    VALIDATOR.validate(read_yaml(path.read_text(encoding="utf-8"), path.name))


def changed(**changes):
    values = copy.deepcopy(SPEC)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            values[section][key] = value
        else:
            values[section] = value
    return values


def optimizer(**options):
    return changed(further_training__optimizer=options)


ACCEPTED = [
    *({**SPEC, "workload": name} for name in SHIPPED),
    changed(workload="a.b_c:d"),
    changed(seeds=5),
    changed(seeds={"count": 5, "first": 3}),
    changed(seeds={"until_reliability": 0.9, "min": 2, "max": 7}),
    changed(removals="all"),
    changed(removals={"all": True}),
    changed(removals={"every": 3}),
    changed(removals={"groups": {"a": [1, 2], "b": [3]}}),
    changed(removals={"fraction": 0.1, "count": 3, "seed": 1}),
    changed(removals={"by": "label"}),
    changed(removals={"from": "groups.txt"}),
    changed(evals=3),
    changed(evals="all"),
    changed(evals=None),
    changed(final_model="x.safetensors"),
    changed(estimators=[]),
    changed(estimators=None),
    changed(estimators=["cg", {"name": "cg", "damping": ["1e-3", 0.1, "matched"]}, {"name": "trak", "seed": [1, 2]}]),
    changed(estimators=[{"name": "lissa", "scale": None, "preconditioner": "ekfac"}]),
    changed(resources={"replay": False, "proof": False, "replicas": "auto", "witnesses": 0, "gpus": 0.25}),
    changed(workload_args={"width": 3, "deep": {"a": [1]}}),
    changed(further_training__trainable="all"),
    changed(further_training__trainable=["head.*"]),
    changed(further_training__lora={"rank": 2, "targets": ["q"]}),
    changed(further_training__evaluate={"at_steps": [1, 4]}),
    changed(further_training__clip_norm=1),
    changed(further_training__removal_mode=None),
    optimizer(name="sgd", lr=1, momentum=0.9, nesterov=True),
    optimizer(name="adamw", betas=[0.8, 0.9], eps=1e-6),
    optimizer(name="adam"),
]

REFUSED = [
    changed(epoch=3),
    changed(name="a/b"),
    changed(name=3),
    changed(workload="no_such_one"),
    changed(workload="a-b:c"),
    changed(seeds=0),
    changed(seeds="five"),
    changed(seeds={"until_reliability": 1.5}),
    changed(seeds={"coutn": 5}),
    changed(removals="some"),
    changed(removals={"every": 0}),
    changed(removals={"indices": [-1]}),
    changed(removals={"fraction": 2, "count": 3}),
    changed(removals={"groups": {"a": 3}}),
    changed(evals="some"),
    changed(evals=0),
    changed(estimators="cg"),
    changed(resources={"proof": "maybe"}),
    changed(resources={"replicas": 0}),
    changed(resources={"replicas": "many"}),
    changed(further_training__epochs=0),
    changed(further_training__precision="float16"),
    changed(further_training__removal_mode="remove"),
    changed(further_training__lora={"rank": 2}),
    changed(further_training__trainable=[]),
    optimizer(name="adamW"),
    optimizer(name="sgd", betas=[0.9, 0.9]),
    optimizer(name="adam", lr="fast"),
    optimizer(lr=0.1),
    {name: value for name, value in SPEC.items() if name != "removals"},
]


@pytest.mark.parametrize("place", range(len(ACCEPTED)))
def test_what_the_validator_accepts_the_schema_accepts(place):
    parse(ACCEPTED[place])
    VALIDATOR.validate(ACCEPTED[place])


@pytest.mark.parametrize("place", range(len(REFUSED)))
def test_what_the_schema_refuses_the_validator_refuses(place):
    assert not VALIDATOR.is_valid(REFUSED[place])
    with pytest.raises(UsageError):
        parse(REFUSED[place])


def test_estimators_are_known_with_their_hyper_parameters():
    from fimo import estimators

    for wrong in (
        "ekfca",
        {"name": "ekfca"},
        {"name": "cg", "dampnig": 1},
        {"name": "cg", "damping": []},
        {"damping": 1},
    ):
        assert not VALIDATOR.is_valid(changed(estimators=[wrong]))
        with pytest.raises(UsageError):
            estimators.parse(wrong)
    for name, kind in estimators.REGISTRY.items():
        everything = {"name": name, **estimators.parse(name)[0].params()}
        VALIDATOR.validate(changed(estimators=[name, everything]))
        assert estimators.parse(everything) == [kind(**{k: v for k, v in everything.items() if k != "name"})]


def test_truth_values_of_yaml_1_1_are_no_mistake_in_an_editor():
    """The language server reads YAML 1.2, for which `off` is a text; fimo reads it as false."""
    for word in WORDS:
        assert isinstance(read_yaml(word, "x"), bool)
        assert VALIDATOR.is_valid(changed(resources={"proof": word}))


def test_the_schema_needs_no_torch():
    program = (
        "import sys; sys.argv = ['fimo', 'schema']; from fimo.orchestrator.commands.main import main\n"
        "try: main()\nexcept SystemExit: pass\nassert not {'torch', 'pyarrow'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == SCHEMA
