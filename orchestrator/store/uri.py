"""From what the user wrote to a store: ``DIRECTORY`` or ``s3://bucket/prefix``."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fimo.orchestrator.store.base import Store, is_key, short
from fimo.orchestrator.store.local import LocalStore
from fimo.orchestrator.store.s3 import S3Store
from fimo.workers.errors import UsageError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_FORMS = "use a directory or s3://bucket/prefix"


def open_store(uri: str) -> Store:
    """The store at `uri`; touches neither disk nor network. Raises `UsageError` when it is malformed.

    A directory is made absolute here (``~`` expanded), so that the store means the same in a Ray task
    with another working directory.
    """
    scheme = _SCHEME.match(uri)
    if scheme and scheme[1] == "s3":
        return _open_s3(uri)
    if scheme and not os.path.exists(uri):
        raise UsageError(f"stores of scheme '{scheme[1]}:' are not known: {_FORMS}")
    if not uri.strip() or not uri.isprintable():
        raise UsageError(f"{short(uri)} names no store: {_FORMS}")
    try:
        root = Path(uri).expanduser()
    except RuntimeError:
        raise UsageError(f"{short(uri)} names no user's home directory: {_FORMS}") from None
    return LocalStore(uri, Path(os.path.abspath(root)))


def _open_s3(uri: str) -> S3Store:
    _refuse_credentials(uri)
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    prefix = prefix.removesuffix("/")
    if not uri.startswith("s3://") or not _BUCKET.fullmatch(bucket):
        raise UsageError(f"{short(uri)} names no S3 bucket: {_FORMS}")
    if prefix and not is_key(prefix):
        raise UsageError(f"{short(uri)} has a prefix that no key can have (empty, '..', hidden or control): {_FORMS}")
    return S3Store(uri, bucket, prefix)


def _refuse_credentials(uri: str) -> None:
    """The URI is not repeated in this message: it may hold one."""
    if any(character in uri for character in "@?#%"):
        raise UsageError(
            "an s3:// URI takes no user, password, query or escapes: credentials come from the AWS environment"
        )


def split_sweep(uri: str) -> tuple[str, str]:
    """``STORE/NAME`` as (STORE, NAME), for directories and S3; a bare NAME is in the current directory.

    Raises `UsageError` when there is no NAME, or one that no sweep can have.
    """
    if uri.startswith("s3:"):
        _refuse_credentials(uri)
    store, slash, name = uri.rstrip("/").rpartition("/")
    if not is_key(name) or _SCHEME.fullmatch(name) or store in ("s3:", "s3:/"):
        raise UsageError(
            f"{short(uri)} names no sweep: write STORE/NAME, e.g. runs/concrete or s3://bucket/runs/concrete"
        )
    if not store:
        store = "/" if slash else "."
    open_store(store)
    return store, name
