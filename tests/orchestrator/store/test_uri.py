"""What a user writes as a store or a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from fimo.orchestrator.store import LocalStore, S3Store, open_store, split_sweep
from fimo.workers.errors import UsageError


def test_a_directory_means_the_same_from_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("runs/x")
    assert isinstance(store, LocalStore)
    assert (store.uri, store.root) == ("runs/x", tmp_path / "runs/x")
    assert not (tmp_path / "runs").exists()
    store.create("k", b"1")
    monkeypatch.chdir("/")
    assert store.get("k") == b"1"


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    store = open_store("~/runs")
    assert isinstance(store, LocalStore)
    assert store.root == tmp_path / "runs"
    with pytest.raises(UsageError, match="home"):
        open_store("~no-such-user-here/runs")


@pytest.mark.parametrize(
    ("uri", "bucket", "prefix"),
    [
        ("s3://my-bucket", "my-bucket", ""),
        ("s3://my-bucket/", "my-bucket", ""),
        ("s3://my.bucket/runs", "my.bucket", "runs/"),
        ("s3://my-bucket/a/b/", "my-bucket", "a/b/"),
    ],
)
def test_an_s3_uri_is_bucket_and_prefix(uri: str, bucket: str, prefix: str) -> None:
    store = open_store(uri)
    assert isinstance(store, S3Store)
    assert (store.uri, store.bucket, store.prefix) == (uri, bucket, prefix)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        " ",
        "gs://bucket/x",
        "file:///tmp/x",
        "S3://bucket/x",
        "s3:/bucket/x",
        "s3:bucket",
        "s3://",
        "s3:///x",
        "s3://B_cket/x",
        "s3://bucket/../x",
        "s3://bucket//x",
        "s3://bucket/.x",
        "memory:0",
        "a\nb",
        "a\x00b",
    ],
)
def test_a_malformed_store_is_a_usage_error_that_names_the_forms(uri: str) -> None:
    with pytest.raises(UsageError, match="use a directory or s3://bucket/prefix") as caught:
        open_store(uri)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "uri", ["s3://AKIAEXAMPLE12345678:hunter2@bucket/x", "s3://bucket/x?secret=hunter2", "s3://bucket/x#hunter2"]
)
def test_a_credential_in_a_uri_is_refused_and_not_repeated(uri: str) -> None:
    for function in (open_store, split_sweep):
        with pytest.raises(UsageError) as caught:
            function(uri)
        assert "hunter2" not in str(caught.value)
        assert "AKIA" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "store", "name"),
    [
        ("runs/concrete", "runs", "concrete"),
        ("runs/concrete/", "runs", "concrete"),
        ("concrete", ".", "concrete"),
        ("/concrete", "/", "concrete"),
        ("~/runs/a b", "~/runs", "a b"),
        ("../runs/x", "../runs", "x"),
        ("s3://bucket/concrete", "s3://bucket", "concrete"),
        ("s3://bucket/a/b/concrete/", "s3://bucket/a/b", "concrete"),
    ],
)
def test_a_sweep_is_a_store_and_a_name(uri: str, store: str, name: str) -> None:
    assert split_sweep(uri) == (store, name)


@pytest.mark.parametrize(
    "uri", ["", "/", ".", "..", "runs/..", "s3://bucket", "s3://bucket/", "s3://", "gs://b/x", "a/b\n"]
)
def test_what_names_no_sweep_is_a_usage_error(uri: str) -> None:
    with pytest.raises(UsageError) as caught:
        split_sweep(uri)
    assert "\n" not in str(caught.value)
