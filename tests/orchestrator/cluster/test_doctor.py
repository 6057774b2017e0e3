"""``fimo doctor`` finds a store that would lose results, and tells a sound one from it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from fimo.orchestrator.cluster import doctor
from fimo.orchestrator.run.nodes import Node
from fimo.orchestrator.run.provenance import versions
from fimo.orchestrator.store import Entry, LocalStore, MemoryStore, Store, open_store
from fimo.workers.errors import StoreError


class Overwriting(MemoryStore):
    """A server that takes If-None-Match and does not heed it."""

    def create(self, key: str, data: bytes) -> bool:
        self.put(key, data)
        return True


class Late(MemoryStore):
    """A server whose clock is an hour ahead."""

    def list(self, prefix: str) -> Iterator[Entry]:
        return iter([replace(e, modified=e.modified + timedelta(hours=1)) for e in super().list(prefix)])


class ReadOnly(MemoryStore):
    def create(self, key: str, data: bytes) -> bool:
        raise StoreError("store x: access is denied")


class Forgetful(MemoryStore):
    def list(self, prefix: str) -> Iterator[Entry]:
        return iter(())


def verdicts(store: Store) -> dict[str, bool]:
    return {check.name: check.ok for check in doctor.store_checks(store)}


SOUND = {"credentials": True, "store": True, "conditional writes": True, "clock": True}


def test_a_sound_store_passes_and_is_left_as_it_was(tmp_path: Path) -> None:
    for store in (MemoryStore(), LocalStore("x", tmp_path / "x")):
        assert verdicts(store) == SOUND
        assert list(store.list("")) == []


@pytest.mark.parametrize(
    ("store", "expected"),
    [
        (Overwriting(), {"credentials": True, "store": True, "conditional writes": False}),
        (Late(), SOUND | {"clock": False}),
        (Forgetful(), SOUND | {"clock": False}),
        (ReadOnly(), {"credentials": True, "store": False}),
    ],
    ids=["overwriting", "late", "forgetful", "read-only"],
)
def test_a_store_that_would_fail_later_fails_now(store: MemoryStore, expected: dict[str, bool]) -> None:
    assert verdicts(store) == expected
    assert list(MemoryStore.list(store, "")) == []


def test_a_missing_bucket_is_one_failed_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setattr("fimo.orchestrator.store.s3.PATIENCE_S", 1.0)
    store = open_store("s3://bucket-x/y")
    vars(store)["patience_s"] = 0.5
    [check] = doctor.store_checks(store)
    assert not check.ok
    assert "\n" not in check.line()
    assert "hunter2" not in check.line()


def test_other_versions_and_gpus_that_disagree_are_told() -> None:
    node, ours = Node("id", "host", {}), versions()
    assert doctor._versions(node, ours, dict(ours)).ok
    other = doctor._versions(node, ours, {**ours, "torch": "1.0"})
    assert not other.ok
    assert f"torch 1.0 (driver: {ours['torch']})" in other.detail
    assert not doctor._versions(node, ours, {k: v for k, v in ours.items() if k != "fimo"}).ok
    assert not doctor._gpus(node, 2.0, {"gpus": 0, "device": "CPU"}).ok
    assert not doctor._gpus(node, 0.0, {"gpus": 1, "device": "H100"}).ok
    assert doctor._gpus(node, 2.0, {"gpus": 2, "device": "H100"}).ok


def answer(monkeypatch: pytest.MonkeyPatch, **said: object) -> dict[str, doctor.Check]:
    """What `fimo doctor --address http://…` makes of a cluster whose own doctor said this, all well."""
    job = {"checks": [{"name": "ray", "ok": True, "detail": "answers"}], "ok": True} | said
    text = "a line of the job\n" + json.dumps(job, indent=2) + "\nJob ended"
    monkeypatch.setattr(doctor.jobs, "run_and_wait", lambda *asked, **options: text)
    return {check.name: check for check in doctor.examine(None, "http://head:8265")}


def test_this_machine_is_held_against_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """fimo 9.9.9 here against 0.1.0 there was "all ok"."""
    there = versions() | {"torch": "1.0+cu999", "python": versions()["python"] + "9"}
    assert answer(monkeypatch, versions=there)["this machine"].ok
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "versions", lambda: versions() | {"fimo": "9.9.9"})
        check = answer(patch, versions=there)["this machine"]
    assert not check.ok
    assert f"fimo 9.9.9 here, {there['fimo']} on the cluster" in check.detail
    check = answer(monkeypatch, versions=there | {"python": "3.9.1"})["this machine"]
    assert not check.ok
    assert "python" in check.detail
    assert "3.9.1 on the cluster" in check.detail


@pytest.mark.parametrize("theirs", [None, 3, "0.1.0", ["x"]])
def test_a_cluster_that_does_not_say_its_version_fails(monkeypatch: pytest.MonkeyPatch, theirs: object) -> None:
    said = answer(monkeypatch, **({} if theirs is None else {"versions": theirs}))
    assert not all(check.ok for check in said.values())


class Cluster:
    """A head without CPUs whose autoscaler starts a worker so many looks after it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, looks: int) -> None:
        self.asked: list[list[dict[str, float]]] = []
        self.looks = looks
        monkeypatch.setattr(doctor, "NODE_S", 0.2)
        monkeypatch.setattr("ray.autoscaler.sdk.request_resources", self.request)
        monkeypatch.setattr(doctor.connect, "cluster", lambda address: contextlib.nullcontext())
        monkeypatch.setattr(doctor.cluster_nodes, "nodes", self.nodes)
        monkeypatch.setattr(doctor.cluster_nodes, "on_node", self.on_node)

    def request(self, bundles: list[dict[str, float]]) -> None:
        self.asked.append(bundles)

    def nodes(self) -> list[Node]:
        head = Node("head", "head", {"memory": 1.0})
        if not self.asked:
            return [head]
        self.looks -= 1
        return [head] if self.looks >= 0 else [head, Node("w", "worker", {"CPU": 4.0, "GPU": 1.0}, "A10G")]

    def on_node(self, node: Node, function: object, *arguments: object, gpus: float = 0) -> object:
        assert self.asked[-1] == [{"CPU": 1}], "the node is kept while it is looked at"
        if function is doctor.tiny_shard_twice:
            return ["same", "same"]
        return {"versions": versions(), "gpus": 1 if node.id == "w" else 0, "device": "an A10G"}


def test_workers_that_start_from_zero_are_asked_for_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, said = Cluster(monkeypatch, looks=0), list[str]()
    checks = {check.name: check for check in doctor.ray_checks("auto", said.append)}
    assert all(check.ok for check in checks.values()), checks
    assert "started one" in checks["workers"].detail
    assert "resources: {gpus: 1, accelerator: A10G}" in checks["GPUs on worker"].detail
    assert "determinism on an A10G" in checks
    assert cluster.asked == [[{"CPU": 1}], []]
    assert len(said) == 1


def test_a_node_that_never_comes_is_one_failed_line_and_the_wish_is_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster(monkeypatch, looks=99)
    failed = [check for check in doctor.ray_checks("auto") if not check.ok]
    assert [check.name for check in failed] == ["workers"]
    assert cluster.asked == [[{"CPU": 1}], []]


def test_a_tiny_shard_has_the_same_bits_twice() -> None:
    first, second = doctor.tiny_shard_twice()
    assert first == second
    assert len(first) == 64
