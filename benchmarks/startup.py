"""What commands cost before and beside their own work: CPU and wall seconds from a shell, on a warm file cache.

    python benchmarks/startup.py [--rounds 5] [--store DIR]

A small sweep of Concrete is computed here first; then every command runs once to warm the cache, and in turn so many
times. CPU seconds are those of the command and of what it waits for, so that a second process of `fimo plan` counts.
No figure is of a quiet machine unless its load is told as one: compare those of one table.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import made
import yaml
from scale import put_parts

import fimo
from fimo.orchestrator.store import open_store

SPEC = {
    "name": "small",
    "workload": "concrete",
    "removals": {"every": 90, "count": 10},
    "seeds": 3,
    "evals": 20,
    "further_training": {"optimizer": {"name": "sgd", "lr": 0.03}, "batch_size": 128, "epochs": 3},
    "estimators": ["grad_dot", "grad_cos", "ekfac", {"name": "unrolled", "seeds": 1}],
    "resources": {"proof": False},
}
PROGRAM = "from fimo.orchestrator.commands.main import main; main()"


def spent() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def once(words: list[str]) -> tuple[float, float]:
    """CPU and wall seconds of `fimo` with these words."""
    wall, cpu = time.perf_counter(), spent()
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):
        raise SystemExit(f"fimo {' '.join(words)}: {done.stderr}")
    return spent() - cpu, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store", help="Where the sweeps are written, and left; default: a folder that is removed.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.store or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        spec, large = folder / "small.yaml", made.manifest(1000, 100, 1, 4, shard=1, name="large")
        spec.write_text(yaml.safe_dump(SPEC))
        fimo.run(spec, folder / "store")
        if not (folder / "store" / "large").exists():
            put_parts(large, open_store(str(folder / "store")), folder / "store")
        small = str(folder / "store" / "small")
        commands = {
            "`fimo --help`": ["--help"],
            "`fimo status`, 3 parts": ["status", small],
            "`fimo status`, 99,999 parts": ["status", str(folder / "store" / "large")],
            "`fimo pull`": ["pull", small, "--to", str(folder / "tables")],
            "`fimo plan`": ["plan", str(spec)],
            "`fimo run` of a complete sweep": ["run", str(spec), "--store", str(folder / "store")],
        }
        began, found = os.getloadavg()[0], {name: list[tuple[float, float]]() for name in commands}
        for words in commands.values():
            once(words)
        for _ in range(given.rounds):
            for name, words in commands.items():
                found[name].append(once(words))
    print("| | CPU s | wall s |\n|---|---|---|")
    for name, seconds in found.items():
        cpu, wall = (statistics.median(column) for column in zip(*seconds, strict=True))
        print(f"| {name} | {cpu:.2f} | {wall:.2f} |")
    print(f"\nMedian of {given.rounds}; load average {began:.1f} before, {os.getloadavg()[0]:.1f} after.")


if __name__ == "__main__":
    main()
