"""S3 on a real server: refusals in one line without credentials, processes, crashes of the server."""

from __future__ import annotations

import multiprocessing
import pickle
import random
import socket
import time
import traceback
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from fimo.orchestrator.store import S3Store, Store, open_store
from fimo.orchestrator.store.weather import judge, scrub
from fimo.workers.errors import StoreError
from tests.orchestrator.store.conftest import fresh_s3_store
from tests.support.seaweed import BUCKET, Seaweed, set_environment

pytestmark = pytest.mark.s3

UPLOAD = 3_000_000
KILLS = 1


def _refusal(store: Store, secrets: tuple[str, ...]) -> str:
    """What each operation says, which must be one and the same line but for the verb and the key."""
    said = set()
    for operation in (
        lambda: store.get("key"),
        lambda: store.create("key", b"x"),
        lambda: store.put("key", b"x"),
        lambda: list(store.list("parts/")),
        lambda: store.delete("key"),
        store.check,
    ):
        with pytest.raises(StoreError) as caught:
            operation()
        # A traceback is what a failed Ray task stores and prints: nothing may hang on to the error either.
        everything = str(caught.value) + "".join(traceback.format_exception(caught.value))
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None
        assert "\n" not in str(caught.value)
        assert not any(secret in everything for secret in secrets if secret)
        said.add(str(caught.value).split(": ", 2)[2].split(", still after")[0])
    assert len(said) == 1
    return said.pop()


def test_a_wrong_secret_a_wrong_key_and_no_credentials_are_refused_in_one_line(
    s3_environment: Seaweed, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = (s3_environment.secret_key, s3_environment.access_key, "wrong-secret-value", "AKIAWRONGWRONGWRONG1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-value")
    assert _refusal(fresh_s3_store(), secrets).startswith("its credentials are refused: correct")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_environment.secret_key)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONGWRONGWRONG1")
    assert _refusal(fresh_s3_store(), secrets).startswith("its credentials are refused: correct")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert _refusal(fresh_s3_store(), secrets).startswith("its credentials are incomplete")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert _refusal(fresh_s3_store(), secrets).startswith("no credentials found: set AWS_PROFILE")
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    assert _refusal(fresh_s3_store(), secrets).startswith("the profile named by AWS_PROFILE")


def test_an_anonymous_request_is_refused_by_the_server(s3_environment: Seaweed) -> None:
    """Not fimo's doing, but the fixture's other tests mean nothing without it."""
    with socket.create_connection(("127.0.0.1", s3_environment.ports[0])) as connection:
        connection.sendall(f"GET /{BUCKET}/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert b" 403 " in connection.recv(100)


def test_a_missing_bucket_is_one_line(s3_environment: Seaweed) -> None:
    store = S3Store("s3://no-such-bucket/x", "no-such-bucket", "x", patience_s=2)
    for operation in (lambda: store.get("k"), lambda: list(store.list("")), store.check):
        with pytest.raises(StoreError, match="the bucket does not exist: create it, or correct the name") as caught:
            operation()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "line"),
    [
        ("http://127.0.0.1:9", "the endpoint cannot be reached"),
        ("http://user:hunter2@127.0.0.1:9", "the endpoint cannot be reached"),
        ("nonsense", "AWS_ENDPOINT_URL is not a URL"),
    ],
)
def test_an_unreachable_endpoint_is_one_line_within_the_patience(
    s3_environment: Seaweed, monkeypatch: pytest.MonkeyPatch, endpoint: str, line: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    began = time.monotonic()
    assert _refusal(fresh_s3_store(patience_s=0.2), (s3_environment.secret_key, "hunter2")).startswith(line)
    assert time.monotonic() - began < 6 * 5


def test_a_server_that_never_answers_is_one_line_within_the_patience(
    s3_environment: Seaweed, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(StoreError, match=r"did not answer in time, still after \d+ s of trying; check") as caught:
            fresh_s3_store(patience_s=1, read_timeout_s=0.3).get("k")
        assert "\n" not in str(caught.value)
        assert time.monotonic() - began < 10


def test_tls_to_a_server_without_it_is_one_line(s3_environment: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_environment.endpoint.replace("http:", "https:"))
    assert _refusal(fresh_s3_store(), (s3_environment.secret_key,)).startswith("the server's TLS certificate")


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("key AKIAIOSFODNN7EXAMPLE refused", "AKIAIOSFODNN7EXAMPLE"),
        ("at http://user:hunter2@host/x", "hunter2"),
        ("X-Amz-Credential=abc/2026/s3&X-Amz-Signature=hunter2", "hunter2"),
        ("aws_secret_access_key = hunter2 and more", "hunter2"),
        ("Token: hunter2", "hunter2"),
        ("the current secret is S3CR3T", "S3CR3T"),
    ],
)
def test_nothing_shaped_like_a_credential_survives_the_scrub(text: str, hidden: str) -> None:
    assert hidden not in scrub(text + "\nsecond line " + "x" * 500, secrets=["S3CR3T", None, ""])
    assert "\n" not in scrub(text + "\nsecond line")
    assert hidden not in judge(RuntimeError(text), ["S3CR3T"]).line


def test_no_credential_travels_with_a_pickled_store(s3_environment: Seaweed) -> None:
    store = fresh_s3_store()
    store.create("k", b"x")
    pickled = pickle.dumps(store)
    assert s3_environment.secret_key.encode() not in pickled
    assert s3_environment.access_key.encode() not in pickled
    assert s3_environment.secret_key not in repr(store) + str(vars(store))


def _create_in_child(store: Store, key: str, answers: multiprocessing.Queue[bool]) -> None:
    answers.put(store.create(key, b"child"))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_with_a_live_client_works_in_a_child_process(s3_environment: Seaweed, method: str) -> None:
    store = fresh_s3_store()
    store.create("parent", b"x")
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    for key, expected in (("parent", False), ("child", True)):
        child = context.Process(target=_create_in_child, args=(store, key, answers))
        child.start()
        assert answers.get(timeout=60) is expected
        child.join()
    assert [e.key for e in store.list("")] == ["child", "parent"]


def _upload_for_ever(store: Store, run: int, ready: Event) -> None:
    for number in range(100_000):
        store.create(f"parts/{run}-{number}", bytes([number % 256]) * UPLOAD)
        ready.set()


def test_an_uploader_killed_at_any_moment_leaves_no_torn_object(s3_environment: Seaweed) -> None:
    store, rng = fresh_s3_store(), random.Random(0)
    context = multiprocessing.get_context("fork")
    for run in range(12):
        ready = context.Event()
        child = context.Process(target=_upload_for_ever, args=(store, run, ready))
        child.start()
        assert ready.wait(timeout=60)
        time.sleep(rng.uniform(0.0, 0.08))
        child.kill()
        child.join()
    kept = list(store.list("parts/"))
    assert {entry.key.partition("-")[0] for entry in kept} == {f"parts/{run}" for run in range(12)}
    for entry in kept:
        data = store.get(entry.key)
        assert len(data) == UPLOAD == entry.size
        assert data == data[:1] * UPLOAD


def test_committed_objects_outlive_kills_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Seaweed(tmp_path)
    set_environment(monkeypatch, server.environment())
    server.start()
    try:
        server.wait_until_writable()
        store = fresh_s3_store(patience_s=60)
        for round_ in range(KILLS):
            for number in range(20):
                assert store.create(f"parts/{round_}-{number:02d}", b"%d-%d" % (round_, number) * 2000)
            server.kill()
            server.start()
        kept = list(store.list("parts/"))
        assert len(kept) == 20 * KILLS
        for entry in kept:
            round_, _, number = entry.key.removeprefix("parts/").partition("-")
            assert store.get(entry.key) == b"%d-%d" % (int(round_), int(number)) * 2000
        assert store.create("parts/0-00", b"again") is False
    finally:
        server.stop()


def test_an_object_over_the_limit_of_one_put_is_refused_before_it_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fimo.orchestrator.store.s3.MAX_OBJECT_BYTES", 10)
    for write in (open_store("s3://bucket/x").create, open_store("s3://bucket/x").put):
        with pytest.raises(StoreError, match="has over 5 GiB"):
            write("k", b"x" * 11)


@pytest.mark.parametrize("key", ["a<ETag>b</ETag>.json", "a&amp;<StorageClass>.json", "ETag/StorageClass"])
def test_keys_that_look_like_what_is_left_out_of_a_listing_are_listed_whole(s3_environment: Seaweed, key: str) -> None:
    store = fresh_s3_store()
    store.put(key, b"12345")
    store.put("other", b"1")
    assert [(entry.key, entry.size) for entry in store.list("")] == sorted([(key, 5), ("other", 1)])
