"""The planner, driver, claims, store and reducer with a stand-in for training: what a large sweep costs its driver.

    python benchmarks/scale.py run    [--seeds 1000 --removals 200 --shard 20]     scheduled, committed, reduced
    python benchmarks/scale.py resume [--seeds 1000 --removals 100 --shard 1]      100,000 parts there: listed, status

`run`: 10,000 shards; `--seeds 10000 --removals 100 --shard 100` is 1,000,000 cells in 10,000 shards. `--workers` are
the places that the driver fills. The stand-ins make, encode and commit parts in processes of their own, as workers do;
what they are handed and what comes back goes through pipes, whose cost counts as the driver's. `--unclaimed` runs
without claims, which tells what they cost. `--store s3://…` takes another store than a folder (AWS environment).
`resume` puts the parts there as plain files, or by many threads into another store, for it is not about writing them.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import made
import numpy as np

from fimo.orchestrator.resolve.resolved import Resolved
from fimo.orchestrator.run import claims, driver
from fimo.orchestrator.run.failures import Failures
from fimo.orchestrator.run.owed import owed_tasks
from fimo.orchestrator.run.places import Pool
from fimo.orchestrator.run.results import Failed, Receipt, Result
from fimo.orchestrator.run.work import Shard, Work
from fimo.orchestrator.store import Store, open_store
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Sweep


class StandIn(Pool):
    """Workers that commit made-up parts, in processes of their own as Ray's are.

    Args:
        slots: the tasks that the driver believes to run at once; ``processes`` are those that do.
    """

    def __init__(self, sweep: Sweep, of: Manifest, slots: int, processes: int) -> None:
        self._slots, self._done = slots, queue.SimpleQueue[tuple[Hashable, Result]]()
        self._workers = ProcessPoolExecutor(processes, get_context("spawn"), _begin, (sweep, of))
        # Nothing is timed before they have begun.
        for started in [self._workers.submit(_begun) for _ in range(4 * processes)]:
            started.result()
        self._count = 0

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.shutdown()

    def submit(self, task: Work) -> Hashable:
        self._count += 1
        self._workers.submit(_commit, task).add_done_callback(partial(self._arrived, self._count))
        return self._count

    def _arrived(self, handle: int, done: Future[Receipt]) -> None:
        error = done.exception()
        result = done.result() if error is None else Failed(error, "".join(traceback.format_exception(error)))
        self._done.put((handle, result))

    def wait(self, timeout_s: float) -> list[tuple[Hashable, Result]]:
        found: list[tuple[Hashable, Result]] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._done.get(timeout=timeout_s))
            while True:
                found.append(self._done.get_nowait())
        return found

    def cancel(self, handle: Hashable) -> None:
        return None

    def slots(self) -> int:
        return self._slots


_of: list[tuple[Sweep, Manifest, np.ndarray[Any, Any]]] = []
"""What this worker makes parts of."""


def _begin(sweep: Sweep, of: Manifest) -> None:
    _of.append((sweep, of, made.truth(of)))


def _begun() -> None:
    time.sleep(0.2)


def _commit(task: Work) -> Receipt:
    [(sweep, of, effects)] = _of
    assert isinstance(task, Shard)
    began = time.process_time()
    key, data = made.part(of, task.seed, task.removals, effects)
    written = sweep.store.create(key, data)
    return Receipt(key, written, len(task.removals), 0, time.process_time() - began, "made")


class Unclaimed(claims.Claims):
    def take(self, work: Sequence[Work]) -> list[bool]:
        return [True for _ in work]

    def release(self, work: Work) -> None:
        return None


def run(of: Manifest, store: Store, given: argparse.Namespace) -> None:
    clocks: list[tuple[float, float]] = []
    memory: list[float] = []

    @contextlib.contextmanager
    def place(sweep: Sweep, of: Manifest, _: bytes | None) -> Iterator[Pool]:
        with StandIn(sweep, of, given.workers, given.processes) as pool:
            clocks.append((time.perf_counter(), time.process_time()))
            memory.append(peak_mb())
            yield pool
            clocks.append((time.perf_counter(), time.process_time()))
            memory.append(peak_mb())

    with mock.patch.object(driver, "Claims", Unclaimed if given.unclaimed else claims.Claims):
        report = driver.run(Resolved(of, None, None), store, where=place)  # type: ignore[arg-type]
    clocks.append((time.perf_counter(), time.process_time()))
    shards = len(report.outcome.receipts)
    (computing, reducing), (own, reducing_cpu) = [
        [after - before for before, after in pairwise(one)] for one in zip(*clocks, strict=True)
    ]
    print(f"{of.cells} cells in {shards} shards: {computing:.1f} s, {shards / computing:.0f} shards a second", end="")
    each, theirs = 1e3 / shards, sum(receipt.seconds for receipt in report.outcome.receipts)
    print(f"; of CPU each {each * own:.2f} ms the driver, {each * theirs:.2f} ms the workers")
    print(f"reduced in {reducing:.1f} s ({reducing_cpu:.1f} s of CPU)")
    print(f"memory at most {memory[1]:.0f} MB while computing, {peak_mb():.0f} MB in all, {memory[0]:.0f} MB before")
    print(f"exit {report.exit_code}, {report.gathered.done} of {report.gathered.cells} cells")


def put_parts(of: Manifest, store: Store, folder: Path | None) -> list[str]:
    """All parts of a sweep but one, each with the bytes of the first; as plain files if there is a folder."""
    sweep, effects = Sweep(store, of.spec.name), made.truth(of)
    sweep.write_manifest(of)
    for removals in made.shards(of):
        sweep.write_set(of.digest, removals)
    _, data = made.part(of, 0, of.removals[:1], effects)
    names = [keys.part(of.spec.name, of.digest, seed, r) for seed in of.spec.seeds for r in made.shards(of)][:-1]
    if folder is not None:
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    else:
        with ThreadPoolExecutor(32) as threads:
            list(threads.map(lambda name: store.create(name, data), names))
    return names


def resume(of: Manifest, store: Store, folder: Path | None, there: bool) -> None:
    sweep, names = Sweep(store, of.spec.name), [] if there else put_parts(of, store, folder)
    (tasks, plan), *spent = timed(lambda: owed_tasks(of, sweep, Failures((), {})))
    print(f"{len(names) or 'the'} parts: {len(tasks)} tasks owed, {plan.done} cells done, {told(*spent)}")
    began, used = time.perf_counter(), children()
    uri = sweep.uri if folder is None else f"{folder}/{of.spec.name}"
    program = "from fimo.orchestrator.commands.main import main; main()"
    subprocess.run([sys.executable, "-c", program, "status", uri], check=False, stdout=subprocess.DEVNULL)
    print(f"fimo status: {told(time.perf_counter() - began, children() - used)}")
    print(f"memory at most {peak_mb():.0f} MB")


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def told(wall: float, cpu: float) -> str:
    return f"{wall:.2f} s, {cpu:.2f} s of CPU"


def children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="?", choices=["run", "resume"], default="run")
    for name, default in (("seeds", 1000), ("removals", 0), ("shard", 0), ("steps", 1), ("evals", 4), ("workers", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--processes", type=int, default=2, help="that stand in for workers")
    parser.add_argument("--store")
    parser.add_argument("--unclaimed", action="store_true")
    parser.add_argument("--there", action="store_true", help="the parts are in --store already, from the last time")
    given = parser.parse_args()
    removals, shard = (200, 20) if given.what == "run" else (100, 1)
    of = made.manifest(
        given.seeds, given.removals or removals, given.steps, given.evals, shard=given.shard or shard, name="scale"
    )
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(given.store or folder)
        if given.what == "run":
            run(of, store, given)
        else:
            resume(of, store, None if given.store else Path(folder), given.there)


if __name__ == "__main__":
    main()
