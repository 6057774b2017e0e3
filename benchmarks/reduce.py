"""How fast parts are read, verified, reduced and scored: MB of their numbers a second, and memory.

    python benchmarks/reduce.py [--seeds 100] [--removals 100] [--steps 20] [--evals 100] [--estimators 10]

Parts are made up (`made.py`) in a folder of the machine's; what is measured is `gather` and nothing else, in CPU
seconds of this process beside those of the clock.
"""

from __future__ import annotations

import argparse
import cProfile
import hashlib
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
    parser.add_argument("--profile", help="KEY,LINES of pstats: cumulative,40")
    given = parser.parse_args()
    of = manifest(given.seeds, given.removals, given.steps, given.evals, given.estimators)
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(open_store(folder), of.spec.name)
        size = write_sweep(sweep, of) / 1e6
        gather(sweep, manifest(1, given.removals, given.steps, given.evals), lambda line: None)  # what is imported late
        before, profile = peak_mb(), cProfile.Profile()
        wall, cpu = time.perf_counter(), time.process_time()
        if given.profile:
            profile.enable()
        gathered = gather(sweep, of)
        profile.disable()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    text = f"{size:.0f} MB in {given.seeds} seeds, {given.estimators} estimators: "
    print(
        f"{text}{wall:.2f} s, {cpu:.2f} s of CPU: {size / cpu:.0f} MB a second of CPU, {size / wall:.0f} by the clock"
    )
    print(f"memory at most {peak_mb():.0f} MB, {peak_mb() - before:.0f} more than before")
    sha = hashlib.sha256()
    for name in sorted(gathered.tables):
        sha.update(encode_table(gathered.tables[name]))
    print("tables", sha.hexdigest()[:16], gathered.complete)
    if given.profile:
        pstats.Stats(profile).sort_stats(*given.profile.split(",")[:1]).print_stats(int(given.profile.split(",")[1]))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
