"""Several workers beside one: shards a second of one worker process, and of several at once that share the machine.

    python benchmarks/workers.py [--rounds 5]                 two on two cores, one thread each
    PYTHONPATH=.links python benchmarks/workers.py --device cuda [--workers 1 2 4]      all on one GPU

A worker trains shards as a sweep's task does, in stacks of the size that it would measure: Concrete (drop and reweight,
95 cells and their baseline, 20 epochs), and on a GPU a ResNet-9, whose convolutions are not stacked. On cores, what is
short of as many times as much is what they share: memory, caches, clock, and a core that is a thread of another's. On a
GPU it tells which ``resources: {gpus: 1/N}`` is worth its memory. Wall time, so that it means something on a machine
without other work alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from engine import Case, image, tabular
from recorded import told

HEADING = {"cpu": "Two workers", "cuda": "Several workers on one GPU"}


def case_of(name: str, device_type: str) -> Case:
    if name == "resnet9":
        return replace(case := image(), settings=replace(case.settings, epochs=2 if device_type == "cpu" else 40))
    return replace(case := tabular(name), settings=replace(case.settings, epochs=20))


def worker(name: str, device_type: str, share: float, pipe: Connection) -> None:
    """Train a shard each time it is told to."""
    import torch

    from fimo.workers.device import deterministic
    from fimo.workers.shard import run_shard
    from fimo.workers.stacking.size import measure_stack_size
    from fimo.workers.stacking.together import start_of

    torch.set_num_threads(1)
    device, case = torch.device(device_type), case_of(name, device_type)
    if device_type == "cuda":
        torch.cuda.set_per_process_memory_fraction(share)
    with deterministic(device):
        start = start_of(case.workload, case.settings, device=device)
        removals = [(7 * i % len(start.train),) for i in range(case.removals)]
        size = 48 if device_type == "cpu" else measure_stack_size(start, len(removals) + 1)[0]
        run_shard(start, removals, 0, size)
        pipe.send(size)
        while pipe.recv():
            run_shard(start, removals, 1, size)
            pipe.send(size)


def rates(name: str, device_type: str, counts: Sequence[int], rounds: int) -> dict[int, list[float]]:
    """Shards a second of so many workers, in turns."""
    spawn, share = get_context("spawn"), 1 / max(counts)
    ends = [spawn.Pipe() for _ in range(max(counts))]
    pipes = [ours for ours, _ in ends]
    found: dict[int, list[float]] = {count: [] for count in counts}
    with ExitStack() as ending:
        for ours, theirs in ends:
            process = spawn.Process(target=worker, args=(name, device_type, share, theirs))
            process.start()
            ending.callback(process.join)
            ending.callback(ours.send, False)
        for pipe in pipes:
            pipe.recv()
        for _ in range(rounds):
            for count in counts:
                began = time.perf_counter()
                for pipe in pipes[:count]:
                    pipe.send(True)
                for pipe in pipes[:count]:
                    pipe.recv()
                found[count].append(count / (time.perf_counter() - began))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workers", type=int, nargs="+", help="default: 1 2; on a GPU 1 2 4")
    parser.add_argument("--only", nargs="+", choices=["drop", "reweight", "resnet9"])
    parser.add_argument("--to", type=Path, help="a Markdown file to keep the table in, under a heading of its own")
    given = parser.parse_args()
    if given.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("There is no GPU here that torch can use: nothing was measured.")
            return
    counts = given.workers or ([1, 2, 4] if given.device == "cuda" else [1, 2])
    names = given.only or (["drop", "resnet9"] if given.device == "cuda" else ["drop", "reweight"])
    rows = []
    for name in names:
        found = rates(name, given.device, counts, given.rounds)
        first = found[counts[0]]
        cells = [f"{statistics.median(first):.3f}"]
        for count in counts[1:]:
            times = [more / one for more, one in zip(found[count], first, strict=True)]
            cells.append(f"{statistics.median(found[count]):.3f} ({statistics.median(times):.2f} times)")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    lines = [
        f"`python benchmarks/workers.py --device {given.device}`, load average {os.getloadavg()[0]:.1f} at the end. "
        "Shards a second:",
        "",
        "| | " + " | ".join(f"{count} workers" if count > 1 else "one worker" for count in counts) + " |",
        "|---" * (1 + len(counts)) + "|",
        *rows,
    ]
    told(HEADING[given.device], lines, given.to)


if __name__ == "__main__":
    main()
