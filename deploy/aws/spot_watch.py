#!/usr/bin/env python3
"""Hears AWS's notice that a spot instance goes, two minutes ahead, and takes this Ray node out of service.

Ray places nothing new on a draining node, lets its tasks finish, and counts no failure when the node goes meanwhile.
A shard that does not finish in time is computed again elsewhere; nothing committed is lost.

    spot_watch.py [--every SECONDS] [--node-id ID]     --node-id: this machine's node unless given

Asks the instance's metadata service (IMDSv2). On demand, or where no such service answers, it waits for ever and does
nothing. One watcher a machine: another one ends at once. Not needed in Kubernetes, where `ray start --block` drains
when the pod is told to end.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime

SERVICE = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/")
TOKEN_S = 21600
"""What a token lives; a new one is fetched for every question that is refused."""
MARGIN_S = 5.0
"""Kept between the end that Ray is told and the end that AWS told."""
LOCK = "/tmp/spot_watch.lock"
# Never through a proxy: the service is the machine's own.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def main() -> int:
    """Wait for the notice, then drain."""
    parser = argparse.ArgumentParser(description="Drain this Ray node when AWS says that its spot instance goes.")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between questions")
    parser.add_argument("--node-id", help="Ray's id of the node; default: this machine's")
    parser.add_argument("--lock", default=LOCK)
    arguments = parser.parse_args()
    with open(arguments.lock, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another watcher runs here")
            return 0
        watch = Metadata()
        while (end := watch.end()) is None:
            time.sleep(arguments.every)
        return drain(end, arguments.node_id)


class Metadata:
    """The instance's metadata service."""

    def __init__(self) -> None:
        self._token: str | None = None

    def end(self) -> datetime | None:
        """When the instance goes; None without a notice, and while the service does not answer."""
        try:
            notice = json.loads(self._get("/latest/meta-data/spot/instance-action"))
            return datetime.fromisoformat(notice["time"])
        except urllib.error.HTTPError as error:
            if error.code == 401:
                self._token = None
        except OSError:
            pass
        except (ValueError, KeyError, TypeError):
            # A notice of another form is a notice: the instance has two minutes at most.
            say("a notice that cannot be read")
            return datetime.fromtimestamp(time.time() + 120, UTC)
        return None

    def _get(self, path: str) -> str:
        if self._token is None:
            self._token = self._ask("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)})
        return self._ask("GET", path, {"X-aws-ec2-metadata-token": self._token})

    def _ask(self, method: str, path: str, headers: dict[str, str]) -> str:
        request = urllib.request.Request(SERVICE + path, headers=headers, method=method)
        with _open(request, timeout=2) as answer:
            text: str = answer.read().decode()
        return text


def drain(end: datetime, node: str | None) -> int:
    """Ask Ray until it has accepted, or until the instance goes."""
    say(f"this instance goes at {end.isoformat()}")
    while (left := end.timestamp() - time.time() - MARGIN_S) > 0:
        command = ["ray", "drain-node", *(["--node-id", node] if node else [])]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the spot instance goes"]
        command += ["--deadline-remaining-seconds", str(int(left))]
        if subprocess.run(command, check=False).returncode == 0:
            say(f"draining, {left:.0f} s left")
            return 0
        time.sleep(1)
    return 1


def say(text: str) -> None:
    """A line with its time, into the log."""
    print(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} spot_watch: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
