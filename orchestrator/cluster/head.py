"""The head of a cluster: its dashboard's job server, reached with one line of error and never a leaked token.

Ray's token comes from the places that Ray itself reads (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token). A
store's record of a job names a head, and a store must not choose who gets the token: it is sent only to a head that
the user named, on the command line now or on this machine before (kept in `heads` in the user's state folder, as ssh
keeps known hosts).
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fimo.orchestrator.run.connect import knock
from fimo.orchestrator.store.weather import scrub
from fimo.workers.errors import FimoError, UsageError

ANSWER_TIMEOUT_S = 10.0


class JobError(FimoError):
    """The cluster's job server cannot be reached, refuses, or does not know the job."""


def check_address(address: str) -> None:
    """Raise UsageError unless ``address`` is http(s)://HOST[:PORT] without credentials."""
    parts = urlsplit(address)
    try:
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment:
        raise UsageError(f"--address {scrub(address)[:80]}: give the head's dashboard, http://HEAD:8265")
    if parts.username is not None or parts.password is not None:
        raise UsageError("--address takes no user or password; Ray's token comes from RAY_AUTH_TOKEN")


def connect(address: str) -> Any:
    """Ray's job submission client, its versions held against ours.

    Raises:
        JobError: one line: unreachable, the token is missing or wrong, another version of Ray.
    """
    _knock(address)
    _refuse_silent(address)
    import ray
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)
    logging.getLogger("ray").setLevel(logging.WARNING)
    with Telling(address):
        client = JobSubmissionClient(address)
    theirs = getattr(client, "_server_ray_version", None)
    if theirs != ray.__version__:
        raise JobError(
            f"the cluster at {address} runs Ray {theirs}, this machine {ray.__version__}: "
            "install the same version of fimo and Ray on both"
        )
    return client


def _knock(address: str) -> None:
    """Try a connection with the time-out that Ray's client lacks; not through a proxy, which would answer itself."""
    from requests.utils import get_environ_proxies

    if get_environ_proxies(address):
        return
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    reason = knock(parts.hostname or "", port)
    if reason is not None:
        raise JobError(
            f"no Ray head answers at {address} ({reason}): check the address (http://HEAD:8265), that the head runs, "
            "and that its port is forwarded"
        )


def _refuse_silent(address: str) -> None:
    """Ask for something, without the token, with the time-out that Ray's client lacks."""
    import requests

    try:
        requests.get(f"{address.rstrip('/')}/api/version", timeout=ANSWER_TIMEOUT_S)
    except requests.Timeout:
        raise JobError(
            f"what answers at {address} is no Ray dashboard, or says nothing for {ANSWER_TIMEOUT_S:.0f} s: give the "
            "head's, http://HEAD:8265"
        ) from None
    except requests.RequestException:
        return  # Ray's client says why.


class Telling:
    """Turns an error of Ray's client in the body into a JobError of one line, without the token."""

    def __init__(self, address: str, job: str | None = None) -> None:
        self.address, self.job = address, job

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, FimoError) or not isinstance(error, Exception):
            return
        raise JobError(self._line(error)) from None

    def _line(self, error: Exception) -> str:
        text, name = str(error), type(error).__name__
        if name == "AuthenticationError":
            return (
                f"the cluster at {self.address} refuses the Ray token: set RAY_AUTH_MODE=token and the cluster's token "
                "in RAY_AUTH_TOKEN or ~/.ray/auth_token"
            )
        if self.job is not None and ("404" in text or "does not exist" in text):
            return f"the cluster at {self.address} knows no job {self.job} (was it restarted?); `fimo resume` goes on"
        if name in ("JSONDecodeError", "KeyError", "InvalidJSONError", "HTTPError") or "404" in text:
            return f"what answers at {self.address} is no Ray dashboard: give the head's, http://HEAD:8265"
        if isinstance(error, OSError):
            return f"the Ray head at {self.address} stopped answering: check that it runs, then try again"
        return f"the cluster at {self.address}: {scrub(text, [os.environ.get('RAY_AUTH_TOKEN')])}"


def _heads() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "fimo" / "heads"


def remembered() -> set[str]:
    """Heads that this machine has submitted to."""
    try:
        return set(_heads().read_text(encoding="utf-8").split())
    except (OSError, ValueError):
        return set()


def remember(address: str) -> None:
    """Keep a head's address for `logs` and `cancel`."""
    if address in remembered():
        return
    try:
        _heads().parent.mkdir(parents=True, exist_ok=True)
        with open(_heads(), "a", encoding="utf-8") as file:
            file.write(f"{address}\n")
    except OSError as error:
        sys.stderr.write(f"fimo: cannot keep the head's address ({error.strerror}): give --address to logs\n")
