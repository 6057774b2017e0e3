"""Two workers beside one: shards a second of one worker process, and of two at once, in turns on the same machine.

    python benchmarks/workers.py [--rounds 5]

A worker trains shards of Concrete as a sweep's task does (drop and reweight, 95 cells and their baseline, 20 epochs),
on one thread. What is short of twice as much is what the cores share: memory, caches, clock, and a core that is a
thread of another's. Wall time, so that it means something on a machine without other work alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from engine import tabular


def worker(mode: str, pipe: Connection) -> None:
    """Train a shard each time it is told to."""
    import torch

    from fimo.workers.device import deterministic
    from fimo.workers.shard import run_shard
    from fimo.workers.stacking.together import start_of

    torch.set_num_threads(1)
    case = tabular(mode)
    with deterministic(torch.device("cpu")):
        start = start_of(case.workload, replace(case.settings, epochs=20))
        removals: list[Any] = [(7 * i,) for i in range(95)]
        run_shard(start, removals, 0, 48)
        pipe.send("ready")
        while pipe.recv():
            run_shard(start, removals, 1, 48)
            pipe.send("done")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    spawn = get_context("spawn")
    print(f"load average {os.getloadavg()[0]:.1f}\n\n| | one worker | two workers | two / one |\n|---|---|---|---|")
    for mode in ("drop", "reweight"):
        ends = [spawn.Pipe() for _ in range(2)]
        workers = [spawn.Process(target=worker, args=(mode, theirs)) for _, theirs in ends]
        for process in workers:
            process.start()
        pipes = [ours for ours, _ in ends]
        for pipe in pipes:
            pipe.recv()

        def seconds(some: list[Any]) -> float:
            began = time.perf_counter()
            for pipe in some:
                pipe.send(True)
            for pipe in some:
                pipe.recv()
            return time.perf_counter() - began

        one, two = [], []
        for _ in range(asked.rounds):
            one.append(seconds(pipes[:1]))
            two.append(seconds(pipes))
        for pipe, process in zip(pipes, workers, strict=True):
            pipe.send(False)
            process.join()
        ratios = [2 * a / b for a, b in zip(one, two, strict=True)]
        cells = (f"{1 / statistics.median(one):.3f}", f"{2 / statistics.median(two):.3f}")
        print(f"| {mode} | {cells[0]} shards a second | {cells[1]} | {statistics.median(ratios):.2f} |", flush=True)


if __name__ == "__main__":
    main()
