"""A store on S3 or a server that speaks its protocol; the only module of fimo that imports boto3.

Invariant: `create` is one `PutObject` with `If-None-Match: *` and a SHA-256 checksum, so an object is
whole or absent and is never replaced. There are no multipart uploads, hence nothing to abort: an
object may have up to 5 GiB, S3's limit for one put.

Endpoint, region and credentials come from the standard AWS environment and config and are never kept.
botocore retries what is transient with its adaptive back-off; around it an operation is tried again
until `patience_s` have passed (a try that has begun may add its own time-outs), then it fails in one line.

Not here: what an error means and how it is told (`weather.py`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any, TypeVar

from fimo.orchestrator.store.base import Entry, NotFound, check_store, is_key, short, validate_key, validate_prefix
from fimo.orchestrator.store.paging import NoAdvanceError, take_pages
from fimo.orchestrator.store.weather import Verdict, judge
from fimo.workers.errors import StoreError

MAX_OBJECT_BYTES = 5 * 2**30
"""S3's limit for one `PutObject`."""

MOST_LISTED = 1000
"""Keys of a page: the most that S3 sends."""

PATIENCE_S = 120.0
"""How long an operation is tried again: longer than a server's restart or a throttled minute."""

CHECK_PATIENCE_S = 10.0
"""The same for `check`, whose user is waiting."""

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
TRIES = 3
"""Tries inside botocore for each of ours."""

LONGEST_PAUSE_S = 8.0

# Refuse answers without S3's own fields: a web server that answers 200 to everything would lose every write.
_FOREIGN = "the endpoint's answer is not S3's: set AWS_ENDPOINT_URL_S3 to an S3 server"

_Answer = TypeVar("_Answer")


class S3Store:
    """See `fimo.orchestrator.store.base.Store`.

    `bucket` must exist. `prefix` is "" or a key. Each process makes its own client at first use, so a
    store may be pickled and may be used after a fork.
    """

    def __init__(
        self,
        uri: str,
        bucket: str,
        prefix: str,
        *,
        patience_s: float = PATIENCE_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        self.uri = uri
        self.bucket = bucket
        self.prefix = prefix + "/" if prefix else ""
        self.patience_s = patience_s
        self.connect_timeout_s = connect_timeout_s
        self.read_timeout_s = read_timeout_s
        self._made: tuple[int, Any, Any] | None = None
        self._making = threading.Lock()

    def __repr__(self) -> str:
        return f"S3Store({self.uri!r})"

    def __getstate__(self) -> Mapping[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_made", "_making")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._made, self._making = None, threading.Lock()

    def create(self, key: str, data: bytes) -> bool:
        """See `Store.create`.

        When the answer to a write is lost, the retry is refused by our own object and the caller sees
        False. Callers compare what is stored with what they meant to store (a part: its rows' digest).
        """
        body = self._writable(key, data)

        def write(client: Any) -> bool:
            try:
                _written(client.put_object(**body, IfNoneMatch="*"))
            except Exception as error:
                if _code(error) in ("PreconditionFailed", "412"):
                    return False
                raise
            return True

        return self._call("write", key, write)

    def put(self, key: str, data: bytes) -> None:
        """See `Store.put`."""
        body = self._writable(key, data)
        self._call("write", key, lambda client: _written(client.put_object(**body)))

    def get(self, key: str) -> bytes:
        """See `Store.get`. Fetches again when the answer is cut off or fails its checksum."""
        validate_key(key)

        def read(client: Any) -> bytes:
            try:
                answer = client.get_object(Bucket=self.bucket, Key=self.prefix + key, ChecksumMode="ENABLED")
            except Exception as error:
                if _code(error) == "NoSuchKey":
                    raise NotFound(f"store {self.uri} has no object {short(key)}") from None
                raise
            return bytes(answer["Body"].read())

        return self._call("read", key, read)

    def list(self, prefix: str) -> Iterator[Entry]:
        """See `Store.list`. Pages of 1000 keys, each tried again by itself; several at once if they are many.

        Sorted here: servers that keep folders list "a/b" before "a-b", which is not key order.
        """
        validate_prefix(prefix)
        entries: dict[str, Entry] = {}

        def ask(under: str, token: str | None, delimiter: str = "") -> Any:
            request: dict[str, Any] = {"Bucket": self.bucket, "Prefix": under, "MaxKeys": MOST_LISTED}
            request |= {"ContinuationToken": token} if token is not None else {}
            request |= {"Delimiter": delimiter} if delimiter else {}
            return self._call("list", prefix, functools.partial(_list_page, request=request))

        def take(page: Any) -> None:
            for item in page.get("Contents", ()):
                key = item["Key"].removeprefix(self.prefix)
                if is_key(key) and item["Key"].startswith(self.prefix):
                    entries[key] = Entry(key, item["Size"], item["LastModified"].astimezone(UTC))

        try:
            take_pages(ask, self.prefix + prefix, take)
        except NoAdvanceError as error:
            raise StoreError(f"store {self.uri}: {error}") from None
        return iter(sorted(entries.values(), key=attrgetter("key")))

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        validate_key(key)
        self._call("remove", key, lambda client: client.delete_object(Bucket=self.bucket, Key=self.prefix + key))

    def check(self) -> None:
        """See `Store.check`. Gives up sooner than the work itself would."""
        hasty = S3Store(
            self.uri,
            self.bucket,
            self.prefix.removesuffix("/"),
            patience_s=min(self.patience_s, CHECK_PATIENCE_S),
            connect_timeout_s=min(self.connect_timeout_s, CHECK_PATIENCE_S / 2),
            read_timeout_s=min(self.read_timeout_s, CHECK_PATIENCE_S),
        )
        check_store(hasty)

    def _writable(self, key: str, data: bytes) -> Mapping[str, Any]:
        validate_key(key)
        if len(data) > MAX_OBJECT_BYTES:
            raise StoreError(f"store {self.uri}: {short(key)} has over 5 GiB, the most that one S3 object takes")
        return {"Bucket": self.bucket, "Key": self.prefix + key, "Body": data, "ChecksumAlgorithm": "SHA256"}

    def _call(self, verb: str, key: str, operation: Callable[[Any], _Answer]) -> _Answer:
        """`operation(client)`, tried again while that may help and `patience_s` last."""
        began = time.monotonic()
        pause_s = 0.1
        while True:
            try:
                return operation(self._client())
            except StoreError:
                raise
            except Exception as error:
                verdict = judge(error, self._secrets())
            # Raise outside the except block: otherwise botocore's error, with its text, would be chained to ours.
            waited_s = time.monotonic() - began
            if not verdict.again or waited_s + pause_s > self.patience_s:
                raise self._failure(verb, key, verdict, waited_s)
            time.sleep(random.uniform(0.5, 1.0) * pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _failure(self, verb: str, key: str, verdict: Verdict, waited_s: float) -> StoreError:
        what = f"store {self.uri}: cannot {verb} {short(key)}" if key else f"store {self.uri}: cannot {verb} it"
        if not verdict.again:
            return StoreError(f"{what}: {verdict.line}")
        return StoreError(
            f"{what}: {verdict.line}, still after {waited_s:.0f} s of trying; check the network, "
            "AWS_ENDPOINT_URL and the server, then run again or `fimo resume`; nothing committed is lost"
        )

    def _client(self) -> Any:
        with self._making:
            if self._made is None or self._made[0] != os.getpid():
                self._made = (os.getpid(), *self._connect())
            return self._made[1]

    def _connect(self) -> tuple[Any, Any]:
        import boto3
        import botocore.session
        from botocore.config import Config

        core = botocore.session.get_session()
        core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_moment)
        session = boto3.session.Session(botocore_session=core)
        config = Config(
            connect_timeout=self.connect_timeout_s,
            read_timeout=self.read_timeout_s,
            retries={"mode": "adaptive", "total_max_attempts": TRIES},
            max_pool_connections=32,
            user_agent_appid="fimo",
        )
        client = session.client("s3", config=config)
        client.meta.events.register_first("before-parse.s3.ListObjectsV2", _lighten)
        return client, session

    def _secrets(self) -> tuple[str | None, ...]:
        """The credentials, to be struck from messages even if they do not look like any."""
        try:
            credentials = self._made[2].get_credentials() if self._made else None
            return (credentials.access_key, credentials.secret_key, credentials.token) if credentials else ()
        except Exception:
            return ()


def _moment(text: Any) -> datetime:
    """A time of an answer: botocore's own parser guesses at its format, which is three quarters of a long listing."""
    # As S3 writes them in bodies; headers and other services have other formats.
    if isinstance(text, str) and text[10:11] == "T" and text.endswith("Z"):
        with contextlib.suppress(ValueError):
            return datetime.fromisoformat(text)
    from botocore.utils import parse_timestamp

    guessed: datetime = parse_timestamp(text)
    return guessed


_UNREAD = re.compile(rb"<(ETag|StorageClass|ChecksumAlgorithm|ChecksumType)>[^<]*</\1>")
"""Of each object of a listing, what nobody here reads."""


def _lighten(response_dict: dict[str, Any], **_: Any) -> None:
    """Take that out of a page, which botocore parses twice: a sixth of a long listing's work."""
    if isinstance(body := response_dict.get("body"), bytes):
        response_dict["body"] = _UNREAD.sub(b"", body)


def _list_page(client: Any, request: Mapping[str, Any]) -> Any:
    page = client.list_objects_v2(**request)
    if "IsTruncated" not in page:
        raise StoreError(_FOREIGN)
    return page


def _written(answer: Mapping[str, Any]) -> None:
    if "ETag" not in answer:
        raise StoreError(_FOREIGN)


def _code(error: Exception) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
