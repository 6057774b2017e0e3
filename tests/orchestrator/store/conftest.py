from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from fimo.orchestrator.store import LocalStore, MemoryStore, S3Store, Store
from tests.support.seaweed import BUCKET, s3_environment, seaweed  # noqa: F401  (fixtures)


@pytest.fixture(params=["memory", "local", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind; S3 is a real server."""
    if request.param == "memory":
        return MemoryStore()
    if request.param == "local":
        return LocalStore(str(tmp_path / "store"), tmp_path / "store")
    request.getfixturevalue("s3_environment")
    return fresh_s3_store()


def fresh_s3_store(patience_s: float = 20, read_timeout_s: float = 10) -> S3Store:
    prefix = f"tests/{uuid.uuid4().hex}"
    return S3Store(f"s3://{BUCKET}/{prefix}", BUCKET, prefix, patience_s=patience_s, read_timeout_s=read_timeout_s)
