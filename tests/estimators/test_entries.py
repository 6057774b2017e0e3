"""Entries of a spec: what is understood, what sweeps, and how a mistake is named."""

from __future__ import annotations

import json

import pytest

from fimo.estimators import REGISTRY, parse
from fimo.workers.errors import UsageError


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_hyper_parameter_is_explicit_and_json(name):
    (estimator,) = parse(name)
    assert estimator.name == name
    assert json.loads(json.dumps(estimator.params())) == dict(estimator.params())


def test_a_list_sweeps_and_an_integer_is_the_same_identity_as_its_float():
    swept = parse({"name": "datainf", "damping_scale": [1, 1.0, "1e-3"], "training_gradient": ["final", "further"]})
    assert [(e.params()["damping_scale"], e.params()["training_gradient"]) for e in swept] == [
        (1.0, "final"),
        (1.0, "further"),
        (0.001, "final"),
        (0.001, "further"),
    ]
    assert all(e.params()["damping"] is None for e in swept)


def test_parameters_given_back_are_the_same_estimator():
    for name in REGISTRY:
        (estimator,) = parse(name)
        (again,) = parse({"name": name, **estimator.params()})
        assert again == estimator


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("gard_dot", "did you mean 'grad_dot'"),
        ({"name": "datainf", "dampnig": 1.0}, "did you mean 'damping'"),
        ({"name": "grad_cos", "damping": 1.0}, "it has none"),
        ({"name": "datainf", "damping": "much"}, "must be a number or matched or null, got 'much'"),
        ({"name": "datainf", "damping": True}, "must be a number"),
        ({"name": "datainf", "damping": float("nan")}, "must be a number"),
        ({"name": "datainf", "damping": -1}, "at least 0"),
        ({"name": "datainf", "damping": 1, "damping_scale": 1}, "not both"),
        ({"name": "datainf", "damping": []}, "empty list"),
        ({"name": "datainf", "training_gradient": "furhter"}, "final | corrected | further"),
        ({"name": "datainf", "displacement_step": 3}, "training_gradient"),
        ({"damping": 1}, "a name"),
        (7, "a name"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(entry, words):
    with pytest.raises(UsageError) as error:
        parse(entry)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
