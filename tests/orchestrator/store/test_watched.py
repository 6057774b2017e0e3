"""A store that is waited for is told while it is waited for, and is the same store."""

from __future__ import annotations

import pickle
import time

import pytest

from fimo.orchestrator.store import LocalStore, MemoryStore, NotFound
from fimo.orchestrator.store import watched as module
from fimo.orchestrator.store.watched import WatchedStore
from fimo.workers.errors import StoreError


class Slow(MemoryStore):
    """Takes its time over one key."""

    def get(self, key):
        if key == "slow":
            time.sleep(0.5)
            raise StoreError("still nothing")
        return super().get(key)


def test_silence_is_told_once_and_its_end_too(monkeypatch):
    monkeypatch.setattr(module, "LOOK_S", 0.02)
    said = []
    with WatchedStore(Slow(), said.append, slow_s=0.1) as store:
        store.put("a", b"1")
        time.sleep(0.1)
        assert not said
        with pytest.raises(StoreError, match="still nothing"):
            store.get("slow")
        time.sleep(0.2)
        assert store.silent_s == 0.0
    assert len(said) == 2
    assert "still waiting for its answer" in said[0]
    assert said[1].endswith("answers")


def test_it_keeps_the_contract_and_is_the_store_itself_elsewhere(tmp_path):
    with WatchedStore(LocalStore("x", tmp_path), print) as store:
        assert store.uri == "x"
        assert store.create("a/b", b"1")
        assert not store.create("a/b", b"2")
        store.put("a/c", b"3")
        assert [entry.key for entry in store.list("a/")] == ["a/b", "a/c"]
        store.delete("a/b")
        with pytest.raises(NotFound):
            store.get("a/b")
        assert store.get("a/c") == b"3"
        store.check()
        elsewhere = pickle.loads(pickle.dumps(store))
    assert elsewhere == LocalStore("x", tmp_path)
