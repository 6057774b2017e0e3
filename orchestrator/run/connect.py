"""A connection to Ray: an embedded cluster of this process's own, or a running one.

An embedded one listens on loopback alone, has a folder of its own, and neither joins nor disturbs another Ray of the
machine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fimo.orchestrator.resolve import UPLOADED
from fimo.orchestrator.run import sessions
from fimo.workers.errors import FimoError, UsageError

QUIET = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
EMBEDDED = {
    # Listen on loopback alone: Ray otherwise listens on every interface even when told not to.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # An embedded cluster is this process's own: a token would only be written to the user's home.
    "RAY_AUTH_MODE": "disabled",
}
SEE_ALL_GPUS = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
"""Show every worker all GPUs; a task picks its own by number.

CUDA reads CUDA_VISIBLE_DEVICES once, but Ray may give a reused process another GPU.
"""
CONNECT_TIMEOUT_S = 10.0
HEALTH_TIMEOUT_S = 10.0
NOT_RAY = "Failed to connect to Ray cluster"
SHUTDOWN_S = 10.0
SIGNAL_S = 0.01
"""How long a signal may meet no handler while Ray is shut down."""
OBJECT_STORE_BYTES = 512 * 2**20


class ClusterError(FimoError):
    """The Ray cluster cannot be started or reached."""


@contextlib.contextmanager
def cluster(address: str | None, code: Path | None = None) -> Iterator[None]:
    """Connect to Ray for the body: an embedded cluster on loopback, or the one at ``address`` (``auto`` in a job).

    Args:
        code: a folder that every worker of a cluster gets as its working directory; a job has one of its own.

    Raises:
        ClusterError: one line.
        UsageError: the address is a dashboard's.
        KeyboardInterrupt: SIGTERM came while Ray was starting.
    """
    # "local" is Ray's own word for a cluster of this process.
    address = None if address == "local" else address
    if address is not None and address.startswith(("http://", "https://")):
        raise UsageError(f"--address {address} is a dashboard, which takes jobs: use `fimo submit` or `fimo resume`")
    _knock_at(address)
    wanted = QUIET | SEE_ALL_GPUS if address is None else QUIET
    os.environ.update({name: os.environ.get(name, value) for name, value in wanted.items()})
    if address is None:
        os.environ.update(EMBEDDED)
    import ray  # after the environment that it reads on import

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    folder = contextlib.ExitStack()
    if address is None:
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        options |= {"_temp_dir": str(folder.enter_context(sessions.own_folder()))}
    else:
        options |= {"address": address}
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
            environment: dict[str, Any] = {"env_vars": SEE_ALL_GPUS}
            if code is not None:
                environment = {"env_vars": SEE_ALL_GPUS | {UPLOADED: "1"}, "working_dir": str(code)}
            options["runtime_env"] = environment
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with contextlib.nullcontext() if address is None else _without_stderr():
            ray.init(**options)
    except SystemExit:
        # While Ray starts, its own handler of SIGTERM ends the process, by the signal's number.
        folder.close()
        _put_back(handlers)
        raise KeyboardInterrupt from None
    except Exception as error:
        folder.close()
        raise ClusterError(_unreachable(error, address)) from error
    _put_back(handlers)
    try:
        yield
    finally:
        _shut_down(ray, handlers)
        folder.close()


Handlers = Mapping[signal.Signals, Any]


def _put_back(handlers: Handlers) -> None:
    """Put the caller's handlers of signals in place again: the caller decides how to end.

    Ray's own handler of SIGTERM aborts. When it is shut down, its native code has SIGTERM kill the process at once,
    while Python still names the caller's handler.
    """
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if handler is not None:  # one that is not Python's
                signal.signal(number, handler)


def _shut_down(ray: Any, handlers: Handlers) -> None:
    """Disconnect, waiting for it only so long: a head that has gone does not answer."""
    ended = threading.Thread(target=ray.shutdown, name="fimo-shutdown", daemon=True)
    deadline = time.monotonic() + SHUTDOWN_S
    ended.start()
    while ended.is_alive() and time.monotonic() < deadline:
        ended.join(SIGNAL_S)
        _put_back(handlers)
    _put_back(handlers)


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Silence descriptor 2 for the body: if a token is refused, Ray's native code writes a warning there a second."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def knock(host: str, port: int) -> str | None:
    """Why nothing answers at an address, None if something does; Ray itself would try for minutes."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or "no answer"
    return None


def _knock_at(address: str | None) -> None:
    host, _, port = (address or "").rpartition(":")
    if not host or not port.isdecimal():
        return
    reason = knock(host.strip("[]"), int(port))
    if reason is not None:
        raise ClusterError(
            f"cannot reach Ray at {address} ({reason}): check the address (HEAD:6379, or auto on a node of the cluster)"
        )
    # Ray itself would try for a quarter of an hour to hear Ray's protocol from something else.
    ask = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--skip-version-check"]
    ask += ["--address", f"{host}:{port}"]
    try:
        subprocess.run(ask, env=os.environ | QUIET, capture_output=True, timeout=HEALTH_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ClusterError(_unreachable(ConnectionError(NOT_RAY), address)) from None


def _unreachable(error: Exception, address: str | None) -> str:
    where = "an embedded Ray" if address is None else f"Ray at {address}"
    text = str(error).strip()
    if "Version mismatch" in text:
        return f"{where} has other versions than this process; install the same on both ({' '.join(text.split())})"
    if type(error).__name__ == "AuthenticationError" or "nauthenticated" in text:
        return (
            f"{where} refuses the Ray token: set RAY_AUTH_MODE=token and the cluster's token in RAY_AUTH_TOKEN or "
            "~/.ray/auth_token"
        )
    if address is not None and text.startswith(NOT_RAY):
        return (
            f"what answers at {address} is not Ray, or refuses the Ray token: check the port (the head's --port), and "
            "the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token with RAY_AUTH_MODE=token"
        )
    line = (text.splitlines() or [type(error).__name__])[0]
    return f"cannot start or reach {where}: {line}"
