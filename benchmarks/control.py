"""What a control variate saves: seeds at an equal standard error, with the cost of the control's own runs counted.

    python benchmarks/control.py concrete [--seeds 8] [--more 32]
    python benchmarks/control.py cancer --by mirrored

Each workload of `benchmarks/trust.py` is trained further in drop and in reweight, 15 removals × 20 evaluation examples,
float32, and so is the control with the same seeds and with `--more` others (`fimo.orchestrator.tables.control`). A
Markdown table goes to stdout, as `docs/cost-of-trust.md` has it:

    K         other seeds of the control
    ρ         correlation of effect and control over seeds, root mean square over evaluation examples (pooled over
              removals)
    variance  of a controlled mean of `--seeds` seeds over that of a plain one: squared standard errors summed over
              removals and over 200 choices of the seeds and the others from all; the mean over evaluation examples
    control   processor seconds of a control's seed over those of a seed of the sweep
    cost      of the controlled mean over that of a plain one as exact: below 1 it pays
    pays from removals beyond which it would pay, if a seed's cost grows with them and a control's does not (mirrored)
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from small import REMOVALS, SETTINGS, removals_of, trained

from fimo.estimators import Problem, parse
from fimo.orchestrator.tables.control import control
from fimo.workers.start import Start

Array = NDArray[np.float64]
SPLITS = 200


def controls(start: Start, by: str, seeds: Sequence[int], replicas: int) -> tuple[Array, float]:
    """An estimator's values by seed, (S, T, R, m), and processor seconds a seed."""
    [estimator] = parse({"name": by, "seeds": 1})
    began, values = time.process_time(), []
    for seed in seeds:
        problem = Problem(
            model=start.model,
            train=start.train,
            evals=start.examples,
            removals=removals_of(start),
            further_training=start.settings,
            seeds=[seed],
            start=start,
            replicas=replicas,
        )
        values.append(estimator.estimate(problem).values.numpy())
    return np.stack(values), (time.process_time() - began) / len(seeds)


def correlation(effects: Array, own: Array) -> float:
    e, c = effects - effects.mean(axis=0), own - own.mean(axis=0)
    square = (e * c).sum(axis=(0, 1)) ** 2 / ((e**2).sum(axis=(0, 1)) * (c**2).sum(axis=(0, 1)))
    return float(np.sqrt(square.mean()))


def over_splits(effects: Array, own: Array, k: int, more: int) -> float:
    """The ratio of variances, each the mean over ways to choose the sweep's seeds and the others from all of them.

    A single choice is no measure where noise has long tails: a rare large seed lies on one side or on the other.
    """
    rng, squares = np.random.default_rng(0), np.zeros((2, effects.shape[2]))
    for _ in range(SPLITS):
        order = rng.permutation(len(effects))
        chosen, others = order[:k], order[k : k + more]
        one = control(effects[chosen], own[chosen], own[others])
        squares += [(one.sem**2).sum(axis=0), (one.plain_sem**2).sum(axis=0)]
    return float((squares[0] / squares[1]).mean())


def measure(name: str, mode: str, by: str, k: int, more: int) -> None:
    setting = SETTINGS[name]
    start = setting.start(mode, 1.0, "float32")
    cells = trained(start, range(k + more), setting.replicas)
    values, seconds = controls(start, by, range(k + more), setting.replicas)
    dear = seconds / cells.seconds
    for place, step in enumerate(setting.steps):
        effects, own = cells.effects[:, :, place], values[:, place]
        for count in (k, more):
            variance = over_splits(effects, own, k, count)
            spent = (1 + count / k) * dear
            cost = (1 + spent) * variance
            enough = "never" if variance >= 1 else f"{REMOVALS * spent * variance / (1 - variance):.0f}"
            pays = enough if by == "mirrored" else "–"
            print(
                f"| {name}, {mode} | {by} | {step} | {count} | {correlation(effects, own):.2f} | {variance:.2f} "
                f"| {dear:.2f} | {cost:.2f} | {pays} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="workloads (default: concrete)")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--more", type=int, default=32)
    parser.add_argument("--by", nargs="+", choices=("mirrored", "unrolled"), default=["mirrored", "unrolled"])
    asked: Any = parser.parse_args()
    unknown = [name for name in asked.only if name not in SETTINGS]
    if unknown:
        parser.error(f"no workload {', '.join(unknown)}: use {', '.join(SETTINGS)}")
    if asked.seeds < 4 or asked.more < asked.seeds:
        parser.error("--seeds must be at least 4, and --more no fewer than --seeds")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| workload, mode | control | step | K | ρ | variance | control | cost | pays from |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in asked.only or ["concrete"]:
        for mode in ("drop", "reweight"):
            for by in asked.by:
                measure(name, mode, by, asked.seeds, asked.more)


if __name__ == "__main__":
    main()
