"""deploy/aws/spot_watch.py against a metadata service as AWS's: tokens, 404 until the notice, then a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from tests.deploy.manifests import DEPLOY

SCRIPT = DEPLOY / "aws" / "spot_watch.py"
RAY = """#!{python}
import json, os, sys
tries = {folder!r} + "/tries"
with open(tries, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
sys.exit(1 if len(open(tries).readlines()) <= int(os.environ["REFUSALS"]) else 0)
"""


class Service(BaseHTTPRequestHandler):
    """IMDSv2: no answer without a token that was put for, and each token good for three questions."""

    notice: ClassVar[str | None] = None
    asked: ClassVar[list[str]] = []
    uses: ClassVar[dict[str, int]] = {}

    def do_PUT(self) -> None:
        if self.path != "/latest/api/token" or not self.headers.get("X-aws-ec2-metadata-token-ttl-seconds"):
            self._answer(400)
            return
        token = f"token-{len(Service.uses)}"
        Service.uses[token] = 0
        self._answer(200, token)

    def do_GET(self) -> None:
        token = self.headers.get("X-aws-ec2-metadata-token", "")
        if Service.uses.get(token, 3) >= 3:
            self._answer(401)
            return
        Service.uses[token] += 1
        Service.asked.append(self.path)
        if self.path != "/latest/meta-data/spot/instance-action" or Service.notice is None:
            self._answer(404)
            return
        self._answer(200, Service.notice)

    def _answer(self, code: int, body: str = "") -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_arguments: object) -> None:
        return


@contextmanager
def metadata_service() -> Iterator[str]:
    """The service's address; ``Service.notice`` is what it says."""
    Service.notice, Service.asked, Service.uses = None, [], {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture
def endpoint() -> Iterator[str]:
    with metadata_service() as address:
        yield address


def watch(folder: Path, endpoint: str, refusals: int = 0) -> subprocess.Popen[str]:
    """The watcher with a `ray` that writes down what it is told and refuses so often."""
    ray = folder / "ray"
    ray.write_text(RAY.format(python=sys.executable, folder=str(folder)))
    ray.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "AWS_EC2_METADATA_SERVICE_ENDPOINT": endpoint}
    environment |= {"REFUSALS": str(refusals), "http_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, str(SCRIPT), "--every", "0.05", "--lock", str(folder / "lock")]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def tries(folder: Path) -> list[list[str]]:
    path = folder / "tries"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_nothing_is_drained_until_the_notice_and_then_before_the_end(tmp_path: Path, endpoint: str) -> None:
    watcher = watch(tmp_path, endpoint, refusals=1)
    deadline = time.monotonic() + 20
    while len(Service.asked) < 8 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(Service.asked) >= 8, "it stopped asking when its token had ended"
    assert len(Service.uses) >= 2
    assert watcher.poll() is None
    assert tries(tmp_path) == []
    end = datetime.now(UTC) + timedelta(seconds=120)
    Service.notice = json.dumps({"action": "terminate", "time": end.strftime("%Y-%m-%dT%H:%M:%SZ")})
    output, _ = watcher.communicate(timeout=20)
    assert watcher.returncode == 0, output
    refused, told = tries(tmp_path)
    assert refused[:-1] == told[:-1]
    assert told[0] == "drain-node"
    assert told[told.index("--reason") + 1] == "DRAIN_NODE_REASON_PREEMPTION"
    assert 100 <= int(told[told.index("--deadline-remaining-seconds") + 1]) < 116


def test_a_notice_that_cannot_be_read_is_a_notice(tmp_path: Path, endpoint: str) -> None:
    Service.notice = '{"action": "hibernate"}'
    watcher = watch(tmp_path, endpoint)
    output, _ = watcher.communicate(timeout=20)
    assert watcher.returncode == 0, output
    assert len(tries(tmp_path)) == 1


def test_one_watcher_a_machine_and_none_that_dies_of_a_silent_service(tmp_path: Path) -> None:
    first = watch(tmp_path, "http://127.0.0.1:9")
    try:
        time.sleep(0.5)
        second = watch(tmp_path, "http://127.0.0.1:9")
        assert second.wait(timeout=20) == 0
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
