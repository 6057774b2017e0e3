"""The contract every store keeps, and the rule for keys.

Invariant: an object is whole or absent, whatever kills its writer, and `create` has one winner for
each key. All that fimo knows about a sweep's progress follows from those two.

Not here: what keys and objects mean (parts, tables, the spec), and verifying that an object's content
is what a sweep expects.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, runtime_checkable

from fimo.workers.errors import StoreError

MAX_KEY_BYTES = 512
"""Longest key in UTF-8. S3 allows 1024 bytes for the store's own prefix and the key together."""

MAX_SEGMENT_BYTES = 200
"""Longest segment between slashes. File systems allow 255; the rest is for temporary names."""

PROBE_PREFIX = "fimo-probe-"
"""`Store.check` writes one object whose key starts so, directly under the store, and removes it."""


class NotFound(StoreError):
    """There is no object under this key."""


@dataclass(frozen=True, order=True)
class Entry:
    """One listed object: its key, its size in bytes and when it was written (an aware datetime)."""

    key: str
    size: int
    modified: datetime


@runtime_checkable
class Store(Protocol):
    """Objects under keys; the same contract in memory, in a directory and on S3.

    Stores pickle (a Ray task gets one), and may be used by several threads at once. Every failure is a
    `StoreError` of one line in which no credential appears. No key may be another key's folder ("a" and
    "a/b"): a directory cannot hold both.
    """

    @property
    def uri(self) -> str:
        """The store as the user wrote it; holds no credentials."""

    def create(self, key: str, data: bytes) -> bool:
        """Write an object unless there is one: one atomic conditional write, durable on return.

        True: written. False: an object is already there, and is unchanged. It may be the caller's own:
        when the answer to a write is lost, the retry finds the first try's object. Callers to whom
        that matters compare what is stored with what they meant to store.
        """

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object atomically: readers see the old one or the new one, whole."""

    def get(self, key: str) -> bytes:
        """An object's bytes; raises `NotFound`."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """Objects whose key starts with `prefix` (a string prefix: "parts/ab" lists "parts/abc/x").

        Sorted by key (code points, which is also the order of the UTF-8 bytes). Objects whose names no
        key can have (someone else's, or a writer's temporary file) are not listed.
        """

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens when there is none."""

    def check(self) -> None:
        """Raise `StoreError` unless writing, listing and reading work and conditional writes are honoured."""


def validate_key(key: str) -> None:
    """Raise `StoreError` unless `key` is one or more plain names joined by single slashes.

    Refused: absolute keys, empty segments, segments that start with a dot ("..", hidden and temporary
    files), backslashes, control characters, what UTF-8 cannot encode, and over-long keys.
    """
    mistake = _mistake_in(key)
    if mistake:
        raise StoreError(f"{short(key)} is not a key of a store: it {mistake}")


_PLAIN = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", re.ASCII)
"""As nearly all keys are: of a long listing, most are told by it at once."""


def is_key(key: str) -> bool:
    """Whether `validate_key` accepts `key`."""
    return (len(key) <= MAX_SEGMENT_BYTES and _PLAIN.fullmatch(key) is not None) or _mistake_in(key) is None


def validate_prefix(prefix: str) -> None:
    """Raise `StoreError` unless keys could start with `prefix`: "", "a/", "a/b" and the like."""
    folder = prefix.removesuffix("/")
    if prefix and (mistake := _mistake_in(folder)):
        raise StoreError(f"{short(prefix)} is not a prefix of a store's keys: it {mistake}")


def _mistake_in(key: str) -> str | None:
    # isprintable() also refuses lone surrogates, which UTF-8 cannot encode.
    if not key.isprintable() or "\\" in key:
        return "holds a backslash or a character that cannot be printed"
    if len(key.encode()) > MAX_KEY_BYTES:
        return f"is longer than {MAX_KEY_BYTES} bytes"
    segments = key.split("/")
    if not all(segments):
        return "is empty, or starts or ends with a slash, or holds two slashes in a row"
    if any(segment.startswith(".") for segment in segments):
        return "has a segment that starts with a dot"
    if any(len(segment.encode()) > MAX_SEGMENT_BYTES for segment in segments):
        return f"has a segment longer than {MAX_SEGMENT_BYTES} bytes"
    return None


def short(text: str, limit: int = 80) -> str:
    """`text` quoted for a one-line message: escapes for what does not print, cut at `limit`."""
    quoted = ascii(text) if not text.isprintable() else repr(text)
    return quoted if len(quoted) <= limit else quoted[: limit - 4] + "…" + quoted[-1]


def check_store(store: Store) -> None:
    """The common body of `Store.check`: every operation once, on a key of its own that it removes."""
    key = PROBE_PREFIX + uuid.uuid4().hex
    first, second = b"fimo probe, first write", b"fimo probe, second write"
    # List before writing: some servers answer a write to a missing bucket by making the bucket.
    list(store.list(PROBE_PREFIX))
    store.create(key, first)
    try:
        honoured = not store.create(key, second)
        read = store.get(key)
        listed = [entry.key for entry in store.list(key)]
    except StoreError:
        with contextlib.suppress(StoreError):
            store.delete(key)
        raise
    store.delete(key)
    if not honoured or read != first:
        raise StoreError(
            f"store {store.uri} does not honour conditional writes (a second write of the same key was not "
            "refused): results could be overwritten; use a directory, AWS S3, or a server that implements "
            "If-None-Match"
        )
    if listed != [key]:
        raise StoreError(
            f"store {store.uri} does not list an object that was just written: use a server whose listings "
            "are consistent, which resuming needs"
        )
