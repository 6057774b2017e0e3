"""Workloads that come with fimo are named by a bare word."""

from __future__ import annotations

import pytest

from fimo.orchestrator.spec.shipped import SHIPPED
from fimo.orchestrator.spec.spec import parse
from fimo.workers.errors import UsageError
from fimo.workers.workload import load_workload
from tests.support.small_sweep import SPEC, make_spec


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_workload_loads_and_has_one_identity(name, tmp_path):
    short, long = make_spec(workload=name), make_spec(workload=SHIPPED[name])
    assert short.canonical() == long.canonical()
    assert len(load_workload(short.workload, {}, tmp_path).train) > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("concret", "did you mean 'concrete'"),
        ("nothing", "known: concrete"),
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
