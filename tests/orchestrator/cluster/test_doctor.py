"""``fimo doctor`` finds a store that would lose results, and tells a sound one from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from fimo.orchestrator.cluster import doctor
from fimo.orchestrator.run.pool import Node
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


def test_a_tiny_shard_has_the_same_bits_twice() -> None:
    first, second = doctor.tiny_shard_twice()
    assert first == second
    assert len(first) == 64
