"""Ray: the embedded or remote cluster, and the pool that runs tasks on it. The only module that schedules on Ray.

Nothing of value lives in Ray: a task commits its own object and returns a receipt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fimo.orchestrator.resolve.code import code_files, write_files
from fimo.orchestrator.run.entry import enter
from fimo.orchestrator.run.plan import Task
from fimo.orchestrator.run.schedule import Failed, Lost, Result
from fimo.orchestrator.run.tasks import Receipt, is_prepared, run_task
from fimo.orchestrator.spec.spec import Resources
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Sweep
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
    """
    if address is not None and address.startswith(("http://", "https://")):
        raise UsageError(f"--address {address} is a dashboard, which takes jobs: use `fimo submit` or `fimo resume`")
    _knock_at(address)
    wanted = QUIET | SEE_ALL_GPUS if address is None else QUIET
    os.environ.update({name: os.environ.get(name, value) for name, value in wanted.items()})
    if address is None:
        os.environ.update(EMBEDDED)
    import ray  # after the environment that it reads on import

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    else:
        options |= {"address": address}
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
            environment = {"env_vars": SEE_ALL_GPUS}
            options["runtime_env"] = environment | ({"working_dir": str(code)} if code is not None else {})
    # Put the caller's handlers back afterwards: Ray's own handler of SIGTERM aborts, and the caller decides how to end.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with contextlib.nullcontext() if address is None else _without_stderr():
            ray.init(**options)
    except Exception as error:
        raise ClusterError(_unreachable(error, address)) from error
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


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
    if address is not None and text.startswith("Failed to connect to Ray cluster"):
        return (
            f"what answers at {address} is not Ray, or refuses the Ray token: check the port (the head's --port), and "
            "the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token with RAY_AUTH_MODE=token"
        )
    line = (text.splitlines() or [type(error).__name__])[0]
    return f"cannot start or reach {where}: {line}"


def on_ray(
    address: str | None,
) -> Callable[[Sweep, Manifest, bytes | None], contextlib.AbstractContextManager[RayPool]]:
    """Tasks on an embedded Ray, or on the one at ``address``, whose nodes get the workload's code.

    Entering the place raises ClusterError if Ray cannot be reached, and UsageError if the embedded one is too small.
    """

    @contextlib.contextmanager
    def pool(sweep: Sweep, manifest: Manifest, final_model: bytes | None) -> Iterator[RayPool]:
        with connected(address, manifest):
            yield RayPool(sweep, manifest, final_model)

    return pool


@contextlib.contextmanager
def connected(address: str | None, manifest: Manifest) -> Iterator[int]:
    """Connect to Ray for the body, with the workload's code on its nodes; gives how many tasks it can run at once.

    Raises:
        ClusterError: Ray cannot be reached; UsageError: the embedded one is too small for a task.
    """
    resources = manifest.spec.resources
    if address is None:
        with cluster(None):
            here = slots(resources)
            if here < 1:
                # On a cluster a node may still come; here none will.
                raise UsageError(
                    f"resources ask for {resources.cpus:g} CPUs and {resources.gpus:g} GPUs a task, more than this "
                    "machine has: ask for less, or use `fimo submit`"
                )
            yield here
        return
    with tempfile.TemporaryDirectory(prefix="fimo-code-") as folder:
        write_files(code_files(manifest.spec.workload, Path(manifest.beside)), Path(folder))
        with cluster(address, Path(folder)):
            yield slots(resources)


def slots(resources: Resources) -> int:
    """How many tasks the connected Ray can run at once, by what it has now; 0 while it has no node for them."""
    import ray

    have = ray.cluster_resources()
    cpus = have.get("CPU", 0) / resources.cpus
    gpus = have.get("GPU", 0) / resources.gpus if resources.gpus else cpus
    return int(min(cpus, gpus))


def _work(sweep: Sweep, manifest: Manifest, final_model: list[Any], task: Task) -> Receipt:
    """``run_task`` in a worker; θᶠ is fetched (by reference: once a node) only by a process that lacks it."""
    import ray

    data = None if is_prepared(manifest) else ray.get(final_model[0])
    return run_task(sweep, manifest, data, task, gpu_number())


def gpu_number() -> int:
    """torch's number of the GPU that Ray gave the running task; 0 if it gave none."""
    import ray

    given = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if not given:
        return 0
    return visible.index(given[0]) if given[0] in visible else int(given[0])


class RayPool:
    """Tasks as plain Ray tasks; data and θᶠ travel once a node, as objects of Ray's store."""

    def __init__(self, sweep: Sweep, manifest: Manifest, final_model: bytes | None) -> None:
        import ray

        self._ray = ray
        self._resources = resources = manifest.spec.resources
        # Bind max_calls here: otherwise Ray gives each GPU task a new process (0.8 s against 1 ms).
        # Leave retries to the schedule, which tells a worker's death from a task's own error.
        remote = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_calls=0, max_retries=0)
        self._work = remote(enter)
        # Every task unpickles these, and carries removals of its own: the sweep's whole list stays here.
        self._shared = ray.put(pickle.dumps((_work, sweep, dataclasses.replace(manifest, removals=()))))
        # In a list, the reference itself travels, not the bytes.
        self._final = [ray.put(final_model)]
        self._flying: dict[Any, Any] = {}

    def submit(self, task: Task) -> Hashable:
        """Start a task."""
        reference = self._work.remote(self._shared, self._final, pickle.dumps(task))
        self._flying[reference] = task
        handle: Hashable = reference
        return handle

    def wait(self, timeout_s: float) -> list[tuple[Hashable, Result]]:
        """Collect what has finished."""
        if not self._flying:
            return []
        ready, _ = self._ray.wait(list(self._flying), num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = self._ray.wait(list(self._flying), num_returns=len(self._flying), timeout=0)
        results: list[tuple[Hashable, Result]] = []
        for reference in ready:
            del self._flying[reference]
            results.append((reference, self._result(reference)))
        return results

    def _result(self, reference: Any) -> Result:
        errors = self._ray.exceptions
        try:
            receipt: Receipt = self._ray.get(reference)
        except errors.RayTaskError as error:
            cause = getattr(error, "cause", None)
            return Failed(cause if isinstance(cause, BaseException) else error, str(error))
        except errors.RayError as error:
            # Not the task's own error: worker, node, owner or object lost, memory, environment.
            return Lost((str(error).strip().splitlines() or [type(error).__name__])[0])
        return receipt

    def cancel(self, handle: Hashable) -> None:
        """Kill a task's worker."""
        if self._flying.pop(handle, None) is not None:
            with contextlib.suppress(Exception):
                self._ray.cancel(handle, force=True)

    def slots(self) -> int:
        """How many tasks the cluster can run at once; see ``slots``."""
        return slots(self._resources)


# -- nodes, for `fimo doctor` ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A live node of the connected cluster: Ray's id, its host name, and what Ray counts there."""

    id: str
    name: str
    resources: Mapping[str, float]


def nodes() -> list[Node]:
    """The live nodes of the connected cluster."""
    import ray

    alive = [n for n in ray.nodes() if n["Alive"]]
    return [Node(n["NodeID"], n["NodeManagerHostname"], n["Resources"]) for n in alive]


def on_node(node: Node, function: Callable[..., Any], *arguments: Any, gpus: float = 0, timeout_s: float = 120) -> Any:
    """``function(*arguments)`` in a worker of one node, which must be importable there.

    Raises:
        ClusterError: no answer in time, or the task's error in one line.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote: Any = ray.remote
    place = NodeAffinitySchedulingStrategy(node.id, soft=False)
    work = remote(num_cpus=0, num_gpus=gpus, max_calls=0, max_retries=0, scheduling_strategy=place)(function)
    reference = work.remote(*arguments)
    try:
        return ray.get(reference, timeout=timeout_s)
    except Exception as error:
        with contextlib.suppress(Exception):
            ray.cancel(reference, force=True)
        cause = getattr(error, "cause", None) or error
        line = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise ClusterError(f"node {node.name}: {type(cause).__name__}: {line}") from error
