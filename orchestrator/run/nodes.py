"""The nodes of the connected Ray: which there are, what they can run, and work on one of them. Imports Ray."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fimo.orchestrator.run import placement
from fimo.orchestrator.run.connect import ClusterError
from fimo.orchestrator.spec.spec import Resources

NODES_EVERY_S = 1.0


@dataclass(frozen=True)
class Node:
    """A live node of the connected cluster: Ray's id, its host name, what Ray counts there, its type of GPU or ""."""

    id: str
    name: str
    resources: Mapping[str, float]
    accelerator: str = ""

    @property
    def takes_tasks(self) -> bool:
        """Whether Ray counts CPUs or GPUs there."""
        return bool(self.resources.get("CPU", 0) or self.resources.get("GPU", 0))


def nodes() -> list[Node]:
    """The live nodes of the connected cluster."""
    import ray

    alive = [n for n in ray.nodes() if n["Alive"]]
    return [
        Node(n["NodeID"], n["NodeManagerHostname"], n["Resources"], n.get("Labels", {}).get(placement.LABEL, ""))
        for n in alive
    ]


@contextlib.contextmanager
def asking_for_a_node(timeout_s: float) -> Iterator[float | None]:
    """Have the autoscaler start a node that takes tasks, and keep it for the body; it may go when the body ends.

    Gives the seconds until one was there, None if none came in time (or nothing in the cluster starts nodes).
    """
    from ray.autoscaler.sdk import request_resources

    began, came = time.monotonic(), False
    request_resources(bundles=[{"CPU": 1}])
    try:
        while not came and time.monotonic() - began < timeout_s:
            time.sleep(min(1.0, timeout_s))
            came = any(node.takes_tasks for node in nodes())
        yield time.monotonic() - began if came else None
    finally:
        # It stands until another request replaces it.
        request_resources(bundles=[])


def affinity(node: Node) -> Any:
    """A task of this strategy runs on this node alone."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node.id, soft=False)


def on_node(node: Node, function: Callable[..., Any], *arguments: Any, gpus: float = 0, timeout_s: float = 120) -> Any:
    """``function(*arguments)`` in a worker of one node, which must be importable there.

    Raises:
        ClusterError: no answer in time, or the task's error in one line.
    """
    import ray

    remote: Any = ray.remote
    place = affinity(node)
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


def slots(resources: Resources) -> int:
    """How many tasks the connected Ray can run at once, by what it has now; 0 while it has no node for them."""
    return sum(slots_of(resources, node.resources) for node in nodes() if placement.fits(node, resources))


def slots_of(resources: Resources, node: Mapping[str, float]) -> int:
    """How many tasks a node with these resources can run at once."""
    cpus = node.get("CPU", 0) / resources.cpus
    gpus = node.get("GPU", 0) / resources.gpus if resources.gpus else cpus
    # What is divided in binary may come out a hair under a whole number.
    return int(min(cpus, gpus) + 1e-9)


class NodeWatch:
    """The live nodes, looked at from a thread of its own: Ray's answer comes late or never once the head is gone.

    Attributes:
        nodes: as last seen; ``since``: when each was first seen, on the monotonic clock.
    """

    def __init__(self) -> None:
        self.nodes = nodes()
        self._seen = time.monotonic()
        self.since = dict.fromkeys((node.id for node in self.nodes), self._seen)
        self._stop = threading.Event()
        threading.Thread(target=self._look, name="fimo-nodes", daemon=True).start()

    @property
    def silent_s(self) -> float:
        """Seconds since the head answered."""
        return time.monotonic() - self._seen

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()

    def _look(self) -> None:
        while not self._stop.wait(NODES_EVERY_S):
            with contextlib.suppress(Exception):
                found = nodes()
                self._seen = time.monotonic()
                self.since = {node.id: self.since.get(node.id, self._seen) for node in found}
                self.nodes = found
