"""Ray: the embedded or remote cluster, and the pool that runs tasks on it. The only module that schedules on Ray.

Nothing of value lives in Ray: a task commits its own object and returns a receipt.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from orchestrator.schedule import Failed, Lost, Result
from orchestrator.spec import Resources
from orchestrator.tasks import Context, Receipt, Task, run_task
from workers.errors import FimoError

QUIET = {
    # Loopback only: Ray otherwise listens on every interface even when told not to.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
OBJECT_STORE_BYTES = 512 * 2**20


class ClusterError(FimoError):
    """The Ray cluster cannot be started or reached."""


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connect to Ray for the body: an embedded cluster on loopback, or the one at ``address`` (``auto`` in a job).

    Raises:
        ClusterError: one line.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    if address is None:
        # An embedded cluster is this process's own and on loopback: a token would only be written to the user's home.
        os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray  # after the environment that it reads on import

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    else:
        options |= {"address": address}
    try:
        ray.init(**options)
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = "an embedded Ray" if address is None else f"Ray at {address}"
        raise ClusterError(f"cannot start or reach {where}: {line}") from error
    try:
        yield
    finally:
        ray.shutdown()


def on_ray(
    address: str | None,
) -> Callable[[Context, bytes | None, Resources], contextlib.AbstractContextManager[RayPool]]:
    """Tasks on an embedded Ray, or on the one at ``address``."""

    @contextlib.contextmanager
    def pool(context: Context, final_model: bytes | None, resources: Resources) -> Iterator[RayPool]:
        with cluster(address):
            yield RayPool(context, final_model, resources)

    return pool


class RayPool:
    """Tasks as plain Ray tasks; data and θᶠ travel once a node, as objects of Ray's store."""

    def __init__(self, context: Context, final_model: bytes | None, resources: Resources) -> None:
        import ray

        self._ray = ray
        self._resources = resources
        # max_calls must be bound here: Ray gives GPU tasks a new process each otherwise (0.8 s against 1 ms).
        # Retries are the schedule's, which tells a worker's death from a task's own error.
        remote = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_calls=0, max_retries=0)
        self._work = remote(run_task)
        self._context, self._final = ray.put(context), ray.put(final_model)
        self._flying: dict[Any, Any] = {}

    def submit(self, task: Task) -> Hashable:
        """Start a task."""
        reference = self._work.remote(self._context, self._final, task)
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
        """How many tasks the cluster can run at once, by what Ray has now."""
        have = self._ray.cluster_resources()
        cpus = have.get("CPU", 0) / self._resources.cpus
        gpus = have.get("GPU", 0) / self._resources.gpus if self._resources.gpus else cpus
        return max(1, int(min(cpus, gpus)))
