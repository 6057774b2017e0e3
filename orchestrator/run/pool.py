"""Ray: the embedded or remote cluster, and the pool that runs tasks on it. The only module that schedules on Ray.

Nothing of value lives in Ray: a task commits its own object and returns a receipt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import re
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from fimo.orchestrator.run import placement
from fimo.orchestrator.run.entry import enter
from fimo.orchestrator.run.kept import KeptRay
from fimo.orchestrator.run.nodes import Node, NodeWatch, slots_of
from fimo.orchestrator.run.prepared import is_prepared
from fimo.orchestrator.run.results import Failed, Lost, Receipt, Result, UnableError
from fimo.orchestrator.run.tasks import run_task
from fimo.orchestrator.run.work import Work
from fimo.orchestrator.spec.spec import Resources
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Sweep

UNABLE_S = 2.0
HEAD_GONE_S, DOUBT_S = 20.0, 5.0
"""Seconds without an answer after which the head counts as gone, and how long it is doubted.

After 60 Ray ends the process itself.
"""
CANNOT_IMPORT = "failed to import on the worker"
"""What Ray says of a node on which fimo is not installed."""


Where = Callable[[Sweep, Manifest, bytes | None], contextlib.AbstractContextManager["RayPool"]]


@contextlib.contextmanager
def on_ray(address: str | None, say: Callable[[str], None] = lambda line: None) -> Iterator[Where]:
    """Tasks on an embedded Ray, or on the one at ``address``, whose nodes get the workload's code.

    Connected when the first pool is entered, for all pools of the body. Entering a pool raises ClusterError if Ray
    cannot be reached, and UsageError if the embedded one is too small. ``say`` is told once if GPUs are there and none
    is asked for.
    """
    told: list[str] = []
    where = "this machine" if address in (None, "local") else "the cluster"

    def tell_once(seen: Sequence[Node], resources: Resources) -> None:
        if not told and (line := placement.idle_gpus(seen, resources, where)) is not None:
            told.append(line)
            say(line)

    with KeptRay(address) as kept:

        @contextlib.contextmanager
        def pool(sweep: Sweep, manifest: Manifest, final_model: bytes | None) -> Iterator[RayPool]:
            kept.open(manifest)
            ended = False
            try:
                with contextlib.closing(RayPool(sweep, manifest, final_model, tell_once)) as opened:
                    yield opened
                    ended = not opened.gave_up
            finally:
                # What was given up may run on for a moment, and write: no reader shall meet it.
                if not ended:
                    kept.close()

        yield pool


def _work(sweep: Sweep, manifest: Manifest, final_model: list[Any], task: Work) -> Receipt:
    """``run_task`` in a worker; θᶠ is fetched (by reference: once a node) only by a process that lacks it."""
    import ray

    data = None if is_prepared(manifest) else ray.get(final_model[0])
    try:
        receipt = run_task(sweep, manifest, data, task, gpu_number())
        return dataclasses.replace(receipt, node=ray.get_runtime_context().get_node_id())
    except UnableError as error:
        # A node that can begin nothing is done with every task at once: it shall not take all that there are.
        time.sleep(UNABLE_S)
        raise UnableError(str(error), ray.get_runtime_context().get_node_id()) from None


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

    def __init__(
        self,
        sweep: Sweep,
        manifest: Manifest,
        final_model: bytes | None,
        see: Callable[[Sequence[Node], Resources], None] = lambda nodes, resources: None,
    ) -> None:
        """``see`` is shown the nodes now and again: they come and go."""
        import ray

        self._ray, self._see = ray, see
        self._resources = resources = manifest.spec.resources
        # Bind max_calls here: otherwise Ray gives each GPU task a new process (0.8 s against 1 ms).
        # Leave retries to the schedule, which tells a worker's death from a task's own error.
        remote = ray.remote(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            max_calls=0,
            max_retries=0,
            label_selector=placement.selector(resources),
        )
        self._enter = self._work = remote(enter)
        # Every task unpickles these, and carries removals of its own: the sweep's whole list stays here.
        # In a list, a reference itself travels. As an argument of its own Ray asks a node that holds the bytes for a
        # worker, and waits for ever for one that has frozen, whatever nodes the task may run on.
        self._shared = [ray.put(pickle.dumps((_work, sweep, dataclasses.replace(manifest, removals=()))))]
        self._final = [ray.put(final_model)]
        self._flying: dict[Any, Any] = {}
        self._cancelled = False
        self._avoided: set[str] = set()
        self._frozen: set[str] = set()
        self._heard: dict[str, float] = {}
        self._doubted: float | None = None
        self._watch = NodeWatch()

    def submit(self, task: Work) -> Hashable:
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
            self._hear(receipt.node)
        except errors.RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, errors.RayError):
                return _lost(cause)
            if isinstance(cause, ImportError) or CANNOT_IMPORT in str(error):
                return Failed(UnableError(_lacking(error, cause)), str(error))
            return Failed(cause if isinstance(cause, BaseException) else error, str(error))
        except errors.RayError as error:
            # Not the task's own error: worker, node, owner or object lost, memory, environment.
            return _lost(error)
        return receipt

    def cancel(self, handle: Hashable) -> None:
        """Kill a task's worker."""
        if self._flying.pop(handle, None) is not None:
            self._cancelled = True
            with contextlib.suppress(Exception):
                self._ray.cancel(handle, force=True)

    @property
    def gave_up(self) -> bool:
        """Whether a task was cancelled, or has not ended."""
        return self._cancelled or bool(self._flying)

    def slots(self) -> int:
        """How many tasks the cluster can run at once; see ``slots``."""
        self._see(self._watch.nodes, self._resources)
        away = self._avoided | self._frozen
        able = [n for n in self._watch.nodes if n.id not in away and placement.fits(n, self._resources)]
        return sum(slots_of(self._resources, node.resources) for node in able)

    def waits(self) -> str | None:
        """What the cluster lacks for a task."""
        if self.slots():
            return None
        asked = placement.in_words(self._resources)
        workers = [node for node in self._watch.nodes if node.takes_tasks]
        if self._avoided and any(node.id in self._avoided for node in workers):
            return f"another node: no task can begin on {', '.join(n.name for n in workers if n.id in self._avoided)}"
        if not workers:
            return f"a node: the cluster has none yet that takes tasks (a task asks for {asked})"
        if not any(placement.fits(node, self._resources) for node in workers):
            there = placement.types(workers) or "nodes without a known GPU"
            return f"a node with {asked} for a task: the cluster has {there}"
        most = {kind: max(n.resources.get(kind, 0) for n in workers) for kind in ("CPU", "GPU")}
        return (
            f"a node with {asked} for a task: the cluster's largest of {len(workers)} have {most['CPU']:g} CPUs and "
            f"{most['GPU']:g} GPUs"
        )

    def lost(self) -> str | None:
        """Whether the head has gone."""
        now = time.monotonic()
        if self._watch.silent_s < HEAD_GONE_S:
            self._doubted = None
        elif self._doubted is None:
            # A driver that was itself stopped for a while finds the last answer old: the head has its chance.
            self._doubted = now
        if self._doubted is None or now - self._doubted < DOUBT_S:
            return None
        return f"the Ray head has not answered for {self._watch.silent_s:.0f} s"

    def avoid(self, node: str) -> None:
        """Start no more tasks on a node."""
        if node:
            self._avoided.add(node)
            self._choose()

    def doubt(self, seconds: float) -> bool:
        """Avoid the nodes that have returned nothing for so long while others have, until they do."""
        since = time.monotonic() - seconds
        fit = [node for node in self._watch.nodes if placement.fits(node, self._resources)]
        able = [node for node in fit if slots_of(self._resources, node.resources)]
        frozen = {n.id for n in able if max(self._heard.get(n.id, 0.0), self._watch.since.get(n.id, 0.0)) < since}
        if len(frozen) == len(able) or frozen <= self._frozen:
            return False
        self._frozen |= frozen
        self._choose()
        return True

    def _hear(self, node: str) -> None:
        self._heard[node] = time.monotonic()
        if node in self._frozen:
            self._frozen.discard(node)
            self._choose()

    def _choose(self) -> None:
        """Have tasks that start from now on run on other nodes than those that are avoided."""
        labels = placement.selector(self._resources, self._avoided | self._frozen)
        self._work = self._enter.options(label_selector=labels or None)

    def close(self) -> None:
        """Look at the nodes no more."""
        self._watch.stop()


def _lost(error: BaseException) -> Lost:
    return Lost((str(error).strip().splitlines() or [type(error).__name__])[0])


def _lacking(error: Exception, cause: object) -> str:
    """Which node lacks a module that a task needs, by Ray's own account of where it failed."""
    where = re.search(r"ip=([0-9a-fA-F.:]+)", str(error))
    node = f"node {where[1]}" if where else "a node"
    missing = re.search(r"(ModuleNotFoundError|ImportError): (.*)", str(error))
    line = f"{missing[1]}: {missing[2]}" if missing else f"{type(cause).__name__}: {cause}"
    return f"{node} cannot begin a task: {line}; install the same packages on every node"
