"""Every store keeps the same contract: in memory, in a directory, and on a real S3 server."""

from __future__ import annotations

import functools
import hashlib
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fimo.orchestrator.store import NotFound, S3Store, Store, validate_key
from fimo.orchestrator.store.base import is_key
from fimo.workers.errors import StoreError

BAD_KEYS = [
    "",
    "/",
    "/etc/passwd",
    "a/",
    "a//b",
    "..",
    "../a",
    "a/../../b",
    "a/./b",
    ".hidden",
    ".fimo-unfinished/x",
    "a\\b",
    "a\nb",
    "a\x00b",
    "a\u202eb",
    "\ud800",
    "x" * 201,
    "/".join(["y" * 100] * 6),
]


def test_what_was_created_is_read_back(store: Store) -> None:
    assert store.create("parts/ab/0.parquet", b"one") is True
    assert store.get("parts/ab/0.parquet") == b"one"


def test_a_second_create_neither_replaces_nor_succeeds(store: Store) -> None:
    assert store.create("k", b"first") is True
    assert store.create("k", b"second") is False
    assert store.get("k") == b"first"


def test_put_replaces_whole(store: Store) -> None:
    store.put("spec.json", b"a long first version")
    store.put("spec.json", b"short")
    assert store.get("spec.json") == b"short"
    assert store.create("spec.json", b"x") is False


def test_a_missing_object_is_not_found_and_not_empty(store: Store) -> None:
    store.create("folder/object", b"x")
    for key in ("absent", "folder", "folder/absent", "absent/absent"):
        with pytest.raises(NotFound, match="has no object") as caught:
            store.get(key)
        assert "\n" not in str(caught.value)


def test_deleted_is_gone_and_deleting_again_is_nothing(store: Store) -> None:
    store.create("parts/a", b"x")
    store.delete("parts/a")
    store.delete("parts/a")
    store.delete("never/was")
    with pytest.raises(NotFound):
        store.get("parts/a")
    assert list(store.list("")) == []
    assert store.create("parts/a", b"again") is True


@pytest.mark.parametrize("size", [0, 1, 255, 5_000_001])
def test_every_byte_survives(store: Store, size: int) -> None:
    data = (bytes(range(256)) * (size // 256 + 1))[:size]
    store.create("binary", data)
    store.put("binary-put", data)
    assert hashlib.sha256(store.get("binary")).digest() == hashlib.sha256(data).digest()
    assert store.get("binary-put") == data
    assert {entry.key: entry.size for entry in store.list("bin")} == {"binary": size, "binary-put": size}


def test_a_listing_is_sorted_by_key_and_filtered_by_string_prefix(store: Store) -> None:
    keys = ["a-b/c", "a/b", "a/b-c/d", "a/c/d", "a.b", "a b/c d", "a0", "b/é/ü", "b/€", "parts/00", "parts-2/x"]
    for key in keys:
        store.create(key, key.encode())
    for prefix in ("", "a", "a/", "a/b", "a/c/", "a b/c ", "b/é/", "parts", "parts/", "zzz", "a/b/none/"):
        assert [e.key for e in store.list(prefix)] == sorted(k for k in keys if k.startswith(prefix)), prefix
    assert {e.size for e in store.list("parts/")} == {len(b"parts/00")}


def test_a_listing_of_an_empty_store_is_empty(store: Store) -> None:
    assert list(store.list("")) == []
    assert list(store.list("parts/")) == []


def test_a_listing_over_a_thousand_keys_loses_and_doubles_none(store: Store) -> None:
    keys = [f"parts/{i % 7}{'-/'[i % 2]}x{i:05d}" for i in range(1205)]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda key: store.create(key, b"x"), keys))
    assert [e.key for e in store.list("parts/")] == sorted(keys)


def test_listed_times_are_aware_and_about_now(store: Store) -> None:
    store.create("now", b"x")
    (entry,) = store.list("")
    assert abs(datetime.now(UTC) - entry.modified) < timedelta(minutes=2)


def test_of_eight_racing_creators_one_wins_and_its_bytes_stay(store: Store) -> None:
    racers = 8

    def one_round(number: int) -> None:
        key, barrier = f"race/{number:03d}", threading.Barrier(racers)

        def race(racer: int) -> bool:
            barrier.wait()
            return store.create(key, b"%d" % racer * 5000)

        with ThreadPoolExecutor(racers) as pool:
            won = list(pool.map(race, range(racers)))
        assert won.count(True) == 1
        assert store.get(key) == b"%d" % won.index(True) * 5000

    # Several rounds at once: SeaweedFS takes whole seconds to tell some of the losers.
    with ThreadPoolExecutor(4) as rounds:
        list(rounds.map(one_round, range(12 if isinstance(store, S3Store) else 100)))


def test_readers_during_overwrites_see_one_version_whole(store: Store) -> None:
    versions = {letter * 200_000 for letter in (b"a", b"b", b"c")}
    store.put("heartbeat", next(iter(versions)))
    done = threading.Event()
    seen: set[bytes] = set()

    def read() -> None:
        while not done.is_set():
            seen.add(store.get("heartbeat"))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(10):
        for version in versions:
            store.put("heartbeat", version)
    done.set()
    reader.join()
    assert seen
    assert seen <= versions


def test_key_tricks_are_refused_by_every_operation_in_one_line(store: Store) -> None:
    for key in BAD_KEYS:
        for operation in (
            functools.partial(store.create, key, b"x"),
            functools.partial(store.put, key, b"x"),
            functools.partial(store.get, key),
            functools.partial(store.delete, key),
        ):
            with pytest.raises(StoreError, match="is not a key of a store") as caught:
                operation()
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 250
    assert list(store.list("")) == []


@pytest.mark.parametrize("prefix", ["/", "../", "a//", ".f", "a\\", "a/../"])
def test_a_listing_cannot_be_led_outside(store: Store, prefix: str) -> None:
    with pytest.raises(StoreError, match="is not a prefix"):
        list(store.list(prefix))


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("a/.\\\n \u202eé-"), max_size=8) | st.text(max_size=12))
def test_a_key_is_never_a_path_that_climbs_or_hides(key: str) -> None:
    if is_key(key):
        validate_key(key)
        assert key.isprintable()
        assert not key.startswith("/")
        assert all(part and not part.startswith(".") and "\\" not in part for part in key.split("/"))


def test_a_store_that_was_pickled_is_the_same_store(store: Store) -> None:
    store.create("before", b"1")
    copy: Store = pickle.loads(pickle.dumps(store))
    assert copy.uri == store.uri
    assert copy.get("before") == b"1"
    assert copy.create("before", b"2") is False
    copy.create("after", b"3")
    assert store.get("after") == b"3"


def test_the_check_passes_and_leaves_nothing_behind(store: Store) -> None:
    store.check()
    assert list(store.list("")) == []


def test_a_store_whose_conditional_writes_overwrite_fails_the_check(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that ignores If-None-Match, imagined by a create that is a put."""
    monkeypatch.setattr(type(store), "create", lambda self, key, data: (self.put(key, data), True)[1])
    with pytest.raises(StoreError, match="does not honour conditional writes"):
        store.check()
    assert list(store.list("")) == []


def test_stores_keep_the_protocol(store: Store) -> None:
    assert isinstance(store, Store)
