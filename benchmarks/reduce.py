"""How fast parts are read, verified, reduced and scored: MB of their numbers a second, and memory.

    python benchmarks/reduce.py [--seeds 100] [--removals 100] [--steps 20] [--evals 100] [--estimators 10]
        [--processes N]

Parts are made up (`made.py`) in a folder of the machine's; what is measured is `gather` and nothing else, in CPU
seconds of this process and of those that share in the reduction, beside those of the clock.
"""

from __future__ import annotations

import argparse
import cProfile
import hashlib
import os
import pstats
import resource
import tempfile
import time

from made import manifest, write_sweep

from fimo.orchestrator.run.gather import gather
from fimo.orchestrator.store import open_store
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables.schemas import encode_table


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("seeds", 100), ("removals", 100), ("steps", 20), ("evals", 100), ("estimators", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--processes", type=int, help="that share in it; default: as many as the parts are worth")
    parser.add_argument("--profile", help="KEY,LINES of pstats: cumulative,40")
    given = parser.parse_args()
    of = manifest(given.seeds, given.removals, given.steps, given.evals, given.estimators)
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(open_store(folder), of.spec.name)
        size = write_sweep(sweep, of) / 1e6
        gather(sweep, manifest(1, given.removals, given.steps, given.evals), lambda line: None)  # what is imported late
        before, profile = peak_mb(), cProfile.Profile()
        wall, cpu = time.perf_counter(), cpu_s()
        if given.profile:
            profile.enable()
        gathered = gather(sweep, of, lambda line: line.startswith("reducing") or print(line), given.processes)
        profile.disable()
        wall, cpu = time.perf_counter() - wall, cpu_s() - cpu
    text = f"{size:.0f} MB in {given.seeds} seeds, {given.estimators} estimators: "
    print(
        f"{text}{wall:.2f} s, {cpu:.2f} s of CPU: {size / cpu:.0f} MB a second of CPU, {size / wall:.0f} by the clock"
    )
    print(f"memory at most {peak_mb():.0f} MB, {peak_mb() - before:.0f} more than before; the largest process that ")
    print(f"shared in it {peak_mb(resource.RUSAGE_CHILDREN):.0f} MB; load {os.getloadavg()[0]:.1f}")
    sha = hashlib.sha256()
    for name in sorted(gathered.tables):
        sha.update(encode_table(gathered.tables[name]))
    print("tables", sha.hexdigest()[:16], gathered.complete)
    if given.profile:
        pstats.Stats(profile).sort_stats(*given.profile.split(",")[:1]).print_stats(int(given.profile.split(",")[1]))


def peak_mb(whose: int = resource.RUSAGE_SELF) -> float:
    return resource.getrusage(whose).ru_maxrss / 1024


def cpu_s() -> float:
    """Of this process and those that it has waited for."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    main()
