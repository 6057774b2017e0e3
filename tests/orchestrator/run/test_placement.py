"""Tasks that name a GPU type run on nodes of that type alone, and GPUs that nobody asked for are told of, once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fimo.orchestrator.run import kept, nodes, placement, pool
from fimo.orchestrator.run.nodes import Node
from fimo.orchestrator.run.pool import RayPool
from fimo.orchestrator.spec.canonical import canonical
from fimo.orchestrator.spec.spec import Resources, parse
from fimo.workers.errors import UsageError
from tests.support.small_sweep import SPEC


def row(cpu: float = 0, gpu: float = 0, label: str = "", name: str = "n") -> Node:
    return Node(name, name, {"CPU": cpu} | ({"GPU": gpu} if gpu else {}), label)


HEAD = row()
MIXED = [HEAD, row(8, 2, "A10G", "a"), row(16, 4, "H100", "h"), row(32)]


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({}, 56),
        ({"cpus": 4}, 14),
        ({"gpus": 1}, 6),
        ({"gpus": 0.25, "cpus": 0.5}, 24),
        ({"gpus": 1, "accelerator": "H100"}, 4),
        ({"gpus": 1, "cpus": 8, "accelerator": "H100"}, 2),
        ({"accelerator": "A10G"}, 8),
        ({"gpus": 1, "accelerator": "L4"}, 0),
    ],
)
def test_only_nodes_of_the_type_count(
    resources: dict[str, object], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "nodes", lambda: MIXED)
    assert nodes.slots(Resources(**resources)) == expected


def waiting(monkeypatch: pytest.MonkeyPatch, resources: Resources, avoided: set[str]) -> RayPool:
    """A pool on those nodes, without Ray."""
    made = RayPool.__new__(RayPool)
    vars(made).update(_watch=SimpleNamespace(nodes=MIXED), _avoided=avoided, _frozen=set(), _resources=resources)
    vars(made)["_see"] = lambda nodes, resources: None
    return made


def test_a_type_that_the_cluster_lacks_is_waited_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert waiting(monkeypatch, Resources(gpus=1, accelerator="H100"), set()).slots() == 4
    assert waiting(monkeypatch, Resources(gpus=1, accelerator="H100"), {"h"}).slots() == 0
    lacking = waiting(monkeypatch, Resources(gpus=1, accelerator="L4"), set()).waits()
    assert lacking is not None
    assert "1 GPUs (L4)" in lacking
    assert "A10G, H100" in lacking


def test_a_node_that_is_avoided_leaves_the_type_asked_for() -> None:
    wanted = Resources(accelerator="H100")
    assert placement.selector(Resources()) == {}
    assert placement.selector(wanted) == {placement.LABEL: "H100"}
    assert placement.selector(wanted, {"b", "a"}) == {placement.LABEL: "H100", placement.NODE_LABEL: "!in(a,b)"}


def test_idle_gpus_are_told_of_and_used_ones_are_not() -> None:
    line = placement.idle_gpus(MIXED, Resources())
    assert line is not None
    assert "the cluster has 6 GPUs (A10G, H100)" in line
    assert "resources: {gpus: 1}" in line
    assert placement.idle_gpus(MIXED, Resources(gpus=0.5)) is None
    assert placement.idle_gpus([HEAD, row(32)], Resources()) is None


def test_a_run_tells_once_however_often_it_looks_and_when_gpus_come_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers start from zero: at the beginning there is no GPU to be seen. A run may enter its place several times."""
    said: list[str] = []
    monkeypatch.setattr(kept.KeptRay, "open", lambda self, manifest: 1)
    made = lambda sweep, manifest, final_model, see: SimpleNamespace(see=see, close=list, gave_up=False)  # noqa: E731
    monkeypatch.setattr(pool, "RayPool", made)
    with pool.on_ray("auto", said.append) as where:
        enter: Any = where
        for _ in range(2):
            with enter(None, None, None) as opened:
                opened.see([HEAD], Resources(gpus=1))
                opened.see(MIXED, Resources(gpus=1))
                opened.see([HEAD], Resources())
        assert said == []
        for _ in range(2):
            with enter(None, None, None) as opened:
                opened.see(MIXED, Resources())
                opened.see(MIXED, Resources())
    assert len(said) == 1
    assert said[0].startswith("the cluster has 6 GPUs")


def test_the_type_is_no_part_of_a_result() -> None:
    """Two specs that differ in it have the same canonical text but for `resources`, which no digest covers."""
    plain, typed = parse(SPEC), parse(SPEC | {"resources": {"accelerator": "H100"}})
    one, other = plain.canonical(), typed.canonical()
    assert one.pop("resources") != other.pop("resources")
    assert canonical(one) == canonical(other)


def test_a_type_that_is_no_label_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match="accelerator") as refused:
        parse(SPEC | {"resources": {"accelerator": "H100, A100"}})
    assert "\n" not in str(refused.value)


CLUSTER = """
import sys, time
import ray
from ray.cluster_utils import Cluster
def node_of(label):
    return {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 10**8, "labels": {"ray.io/accelerator-type": label}}
cluster = Cluster(initialize_head=True, head_node_args={**node_of("A10G"), "include_dashboard": False})
cluster.add_node(**node_of("H100"))
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
from fimo.orchestrator.run import nodes, placement
from fimo.orchestrator.spec.spec import Resources
where = {node["NodeID"]: node["Labels"].get("ray.io/accelerator-type") for node in ray.nodes()}
print("slots", *(nodes.slots(Resources(accelerator=kind)) for kind in (None, "H100", "L4")))
def node():
    time.sleep(0.3)  # or one node takes them all
    return ray.get_runtime_context().get_node_id()
kept = ray.remote(num_cpus=1, label_selector=placement.selector(Resources(accelerator="H100")))(node)
free = ray.remote(num_cpus=1, label_selector=placement.selector(Resources()), scheduling_strategy="SPREAD")(node)
print("kept", *sorted({where[n] for n in ray.get([kept.remote() for _ in range(6)])}))
print("free", *sorted({where[n] for n in ray.get([free.remote() for _ in range(4)])}))
lacking = ray.remote(num_cpus=1, label_selector=placement.selector(Resources(accelerator="L4")))(node)
print("lacking", len(ray.wait([lacking.remote()], timeout=1)[0]))
sys.stdout.flush()
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.ray
def test_tasks_run_on_nodes_of_the_type_alone() -> None:
    """Two raylets with labels: Ray's own scheduler, with the options that the pool gives it."""
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER],
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.splitlines() == ["slots 2 1 0", "kept H100", "free A10G H100", "lacking 0"], done.stderr[-2000:]
