"""Workloads that come with fimo are named by a bare word."""

from __future__ import annotations

import importlib
import inspect

import pytest

from fimo.orchestrator.spec.shipped import SHIPPED
from fimo.orchestrator.spec.spec import parse
from fimo.workers.errors import UsageError
from fimo.workers.workload import load_workload
from tests.support.small_sweep import SPEC, make_spec

WITH_DATA = ("concrete",)
"""Those whose data ships too."""


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_workload_loads_and_has_one_identity(name, tmp_path):
    short, long = make_spec(workload=name), make_spec(workload=SHIPPED[name])
    assert short.canonical() == long.canonical()
    if name in WITH_DATA:
        assert len(load_workload(short.workload, {}, tmp_path).train) > 0
        return
    with pytest.raises(UsageError, match=r"is neither beside the spec nor in .*; get .*; it holds ") as caught:
        load_workload(short.workload, {"data": "nowhere"}, tmp_path)
    assert "\n" not in str(caught.value)


def test_every_shipped_workload_can_start_from_scratch_under_a_seed():
    for reference in SHIPPED.values():
        module, _, function = reference.partition(":")
        parameter = inspect.signature(getattr(importlib.import_module(module), function)).parameters["initial"]
        assert parameter.default is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("concret", "did you mean 'concrete'"),
        ("nothing", "known: causal_lm, cifar10, concrete"),
        ("a b", "module:function, or the name of a shipped workload"),
        ("a:b:c", "module:function"),
        ("x:", "module:function"),
    ],
)
def test_an_unknown_name_is_one_line(given, said):
    with pytest.raises(UsageError, match=r"'workload'") as caught:
        parse({**SPEC, "workload": given})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
