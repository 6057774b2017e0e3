"""What `fimo plan --measure` promises beside what a run then takes: device-seconds of shards and of every estimator.

Each workload is planned and then run in a process of its own, in this machine's CPU seconds, without Ray:

    python benchmarks/plan.py [SPEC …] [--default]

``--default``: with the default set of estimators, whatever the spec names.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
OWN = ("conv_net", "text_classifier", "causal_lm")
SPECS = ("examples/concrete.yaml", *(f"examples/own/{name}.yaml" for name in OWN))
KINDS = {"shard": "shards", "witness": "witnesses"}


def compare(path: Path, default: bool) -> None:
    import torch

    from fimo.orchestrator.report.show import label
    from fimo.orchestrator.resolve.resolved import resolve
    from fimo.orchestrator.run import driver
    from fimo.orchestrator.run.measure import measure
    from fimo.orchestrator.run.owed import current_plan
    from fimo.orchestrator.run.places import in_process
    from fimo.orchestrator.run.work import Shard, WitnessTask
    from fimo.orchestrator.spec.spec import read_file
    from fimo.orchestrator.store import MemoryStore

    torch.set_num_threads(1)
    spec = read_file(path)
    if default:
        spec = spec.model_copy(update={"estimators": None})
    resolved = resolve(spec, path.parent.resolve())
    planned = measure(resolved, current_plan(resolved.manifest, None))
    promised = {label(*named): seconds for named, seconds in planned.by_estimator().items()}
    promised |= {"shards": planned.seconds(Shard), "witnesses": planned.seconds(WitnessTask)}
    report = driver.run(resolved, MemoryStore(), where=in_process)
    taken = defaultdict[str, float](float)
    for row in report.gathered.tables["costs"].to_pylist():
        name = KINDS.get(row["what"]) or label(row["name"], row["params"])
        taken[name] += row["device_seconds"]
    print(f"{path.name}: {resolved.manifest.scalars} scalars")
    print(f"  {'':<28}{'promised':>10}{'taken':>10}{'ratio':>8}")
    promised["all"], taken["all"] = sum(promised.values()), sum(taken.values())
    for name in sorted(set(promised) | set(taken), key=lambda n: (n == "all", -taken[n])):
        ratio = promised.get(name, 0.0) / taken[name] if taken[name] else float("nan")
        print(f"  {name:<28}{promised.get(name, 0.0):>9.2f}s{taken[name]:>9.2f}s{ratio:>8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("specs", nargs="*", type=Path)
    parser.add_argument("--default", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    specs = given.specs or [ROOT / name for name in SPECS]
    if given.one:
        compare(specs[0], given.default)
        return
    for path in specs:
        options = ["--default"] if given.default else []
        subprocess.run([sys.executable, __file__, "--one", str(path), *options], check=True)


if __name__ == "__main__":
    main()
