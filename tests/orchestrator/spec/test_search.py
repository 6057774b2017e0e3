from __future__ import annotations

import copy

import numpy as np
import pytest

from fimo.orchestrator.search.points import points_of
from fimo.orchestrator.spec.search import spread
from fimo.orchestrator.spec.spec import parse
from fimo.workers.errors import UsageError
from tests.support.small_sweep import SPEC


def with_search(search):
    return {**copy.deepcopy(SPEC), "search": search}


def test_a_search_is_part_of_no_identity():
    """Else a spec with another search would be another sweep, and its results be computed anew."""
    plain = parse(SPEC)
    searched = parse(with_search({"estimators": ["grad_dot"], "further_training": {"lr": [0.1, 0.2]}}))
    assert searched.search is not None
    assert searched.canonical() == plain.canonical()
    assert "search" not in searched.canonical()


def test_a_range_is_even_on_a_log_scale_and_has_both_its_ends():
    values = spread({"from": 1e-4, "to": "1e4", "count": 41})
    assert (values[0], values[-1], len(values)) == (1e-4, 1e4, 41)
    np.testing.assert_allclose(np.diff(np.log10(values)), 0.2, atol=1e-3)
    assert spread({"from": 10, "to": 0.1, "count": 3}) == [10.0, 1.0, 0.1]


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({}, "'search': give estimators, further_training, or both"),
        ({"estimatrs": ["cg"]}, "unknown key 'search.estimatrs' (did you mean 'estimators'?)"),
        ({"estimators": []}, "search.estimators"),
        ({"estimators": [{"name": "cg", "damping": {"from": 1, "too": 2, "count": 3}}]}, "(did you mean 'to'?)"),
        ({"estimators": [{"name": "cg", "damping": {"from": 0, "to": 2, "count": 3}}]}, "above 0, got 0"),
        ({"estimators": [{"name": "cg", "damping": {"from": 1, "to": 2, "count": 1}}]}, "whole number from 2 on"),
        ({"estimators": ["cg"], "metric": "cosin"}, "'search.metric'"),
        ({"estimators": ["cg"], "steps": [0]}, "search.steps"),
        ({"further_training": {"lrr": 1}}, "unknown key 'search.further_training.lrr' (did you mean 'lr'?)"),
        ({"further_training": {"lr": {"from": 1}}}, "to is missing"),
        ({"further_training": {"lr": [0.1, -1]}}, "search.further_training.lr"),
        ({"further_training": {"seeds": 1}}, "search.further_training.seeds"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(search, said):
    with pytest.raises(UsageError) as error:
        parse(with_search(search))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def points(*entries):
    search = parse(with_search({"estimators": list(entries)})).search
    return [(p.estimator, p.params) for p in points_of(search)]


def test_every_combination_is_a_point_once_and_whole_numbers_stay_whole():
    found = points({"name": "trak", "dimension": {"from": 4, "to": 6, "count": 9}, "damping": [0.1, 1.0]}, "grad_dot")
    assert len(found) == 3 * 2 + 1
    assert all('"dimension":4' in p or '"dimension":5' in p or '"dimension":6' in p for _, p in found[:-1])
    assert points("grad_dot", "grad_dot") == points("grad_dot")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"name": "cgg"}, "unknown estimator 'cgg'"),
        ({"name": "cg", "dampng": {"from": 1, "to": 2, "count": 3}}, "(did you mean 'damping'?)"),
        ({"name": "cg", "curvature": {"from": 1, "to": 2, "count": 3}}, "is no number"),
    ],
)
def test_a_point_that_cannot_be_is_refused_with_the_nearest_name(entry, said):
    with pytest.raises(UsageError) as error:
        points(entry)
    assert said in str(error.value)
