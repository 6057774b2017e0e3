"""Several seeds in one stack beside one seed in each: CPU seconds of the same shards, in turns.

    python benchmarks/joined.py [--rounds 3] [--seeds 6] [--device cuda]

Shards of Concrete (MLP 8-128-128-1, batch 128, 20 epochs) with few and with many removals, second baselines included,
and how far the deltas of the two are apart. `make bench-gpu` says what a GPU makes of several seeds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from engine import tabular

from fimo.workers.device import deterministic
from fimo.workers.joined import run_shards
from fimo.workers.shard import run_shard
from fimo.workers.stacking.together import start_of

LANES = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    torch.set_num_threads(1)
    print(f"load average {os.getloadavg()[0]:.1f}; stacks of at most {LANES}\n")
    print("| mode | removals a seed | a seed in each, s | several, s | each / several | apart |")
    print("|---|---|---|---|---|---|")
    with deterministic(device):
        for mode in ("drop", "mask", "reweight"):
            case = tabular(mode)
            start = start_of(case.workload, replace(case.settings, epochs=20), device=device)
            for count in (1, 3, 7, 15, 47):
                print(row(start, mode, count, asked), flush=True)


def row(start: Any, mode: str, count: int, asked: argparse.Namespace) -> str:
    shards: list[Any] = [([(20 * i + 1,) for i in range(count)], seed) for seed in range(asked.seeds)]

    def each() -> list[Any]:
        return [run_shard(start, removals, seed, LANES) for removals, seed in shards]

    def several() -> list[Any]:
        return [result for _, results in run_shards(start, shards, LANES) for result in results]

    took: dict[Any, list[float]] = {each: [], several: []}
    results: dict[Any, list[Any]] = {way: way() for way in took}
    for _ in range(asked.rounds):
        for way, seconds in took.items():
            began = time.process_time()
            way()
            seconds.append(time.process_time() - began)
    pairs = zip(results[each], results[several], strict=True)
    apart = max(float((a.deltas - b.deltas).abs().max() / a.deltas.abs().max()) for a, b in pairs)
    alone, joined = (statistics.median(seconds) for seconds in took.values())
    return f"| {mode} | {count} | {alone:.2f} | {joined:.2f} | {alone / joined:.2f} | {apart:.0e} |"


if __name__ == "__main__":
    main()
