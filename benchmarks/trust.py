"""What a trustworthy attribution costs: seeds for a reliability of .95, by removal mode, precision and amount.

    python benchmarks/trust.py [concrete cancer cancer-adamw conv text text-adamw memorised memorised-still]

Each workload is trained further from its final model with 15 of its training examples left out, one at a time, in drop,
mask, reweight, and reweight with a removal weight of 30; in float32 and again in float64 with the same seeds; g is read
on 20 evaluation examples at an early and at a late step. Markdown tables go to stdout, as `docs/cost-of-trust.md` has
them:

    under       share of pairs whose mean over the seeds is under the noise floor, measured by the float64 cells, or, if
                dropout draws other numbers in float64, from θᶠ moved by a unit in the last place (2 seeds, 5 removals)
    s a seed    seconds of processor time of the cells of a seed and their baseline, on one thread: the median seed
    one seed    reliability of one seed, the mean over evaluation examples (`fimo.orchestrator.tables.trust`), without
                adjustment (eq. 17) and centred over the removals (eq. 13)
    for .95     seeds for a reliability of .95, extrapolated; in brackets least and most if any one seed is left out;
                beyond 1000 the measured seeds say no more than that
    s for .95   seeds times seconds: what modes are to be compared by
    diverged    removals with a cell that is not finite: they are left out of all the figures

The second table says how linear the response to the removal weight is: the cosine of effects at w = 3 and w = 30 to
those at w = 1 (float64, the same seeds; mean over seeds and evaluation examples), and the ratio of their root mean
squares.

    python benchmarks/trust.py --estimand [cancer] [--seeds 300]

says instead whether the modes have one estimand: cosines of their means over many seeds, no seed in two modes, *of* the
product of both ceilings, and what one seed is worth by as many seeds; float32.

`text` and `memorised` are a two-layer BERT with dropout .1. A tenth of the labels that `text` is trained on are wrong.
`memorised` has learned its examples by heart, and not the task. `-still` is without dropout.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from small import REMOVALS, SETTINGS, Cells, Setting, effects_of, removals_of, trained

from fimo.orchestrator.tables.agreement import adjusted
from fimo.orchestrator.tables.floor import Pair
from fimo.orchestrator.tables.groups import SeedGroups
from fimo.orchestrator.tables.planning import seeds_for_reliability
from fimo.orchestrator.tables.reduce import Reduction, SeedBlock, reduce
from fimo.orchestrator.tables.reliability import Reliability
from fimo.workers.start import Start
from fimo.workers.witness import MOVED, train_witness, witness_start
from fimo.workers.workload import Workload

Array = NDArray[np.float64]
TARGET, MOST = 0.95, 1000
WIDER, WIDE = 3.0, 30.0
MODES: list[tuple[str, float]] = [("drop", 1.0), ("mask", 1.0), ("reweight", 1.0), ("reweight", WIDE)]


def reduced(effects: Array, pairs: Sequence[Pair] = ()) -> Reduction:
    nothing = np.zeros(effects.shape[2:])
    blocks = (SeedBlock(seed, values, nothing, nothing, 1, ()) for seed, values in enumerate(effects))
    removals, steps, m = effects.shape[1:]
    streamed, reduction = reduce(blocks, removals, steps, m, pairs)
    for _ in streamed:
        pass
    return reduction


def reliability(reduction: Reduction) -> Reliability:
    return Reliability(reduction, SeedGroups(), np.ones(len(reduction.effects.mean), dtype=bool))


def witnesses(setting: Setting, start: Start, single: Cells, double: Cells) -> list[Pair]:
    """Every seed's effects beside the same that round otherwise."""
    removals = removals_of(start)
    witness = witness_start(setting.make(), None, start)
    if witness.how != MOVED:
        return [Pair(tuple(removals), *both) for both in zip(single.effects, double.effects, strict=True)]
    pairs = []
    for seed in range(2):
        again = train_witness(witness, removals[::3], seed, setting.replicas)
        effects = effects_of(again.deltas, start.settings.removal_weight)
        pairs.append(Pair(tuple(removals[::3]), single.effects[seed, ::3], effects))
    return pairs


# -- tables ------------------------------------------------------------------------------------------------------------


def row(cells: Cells, place: int, pairs: Sequence[Pair], adjust: str) -> list[str]:
    """one seed, for .95, s for .95."""
    effects, _ = at(cells.effects, place)
    here = [pair_at(pair, place) for pair in pairs]
    of = reliability(reduced(effects, here))
    defined = ~of.without(adjust)[0]
    if not defined.any():
        return ["–", "–", "–"]
    one = float(of.trust(adjust, 0).reliability(1)[defined].mean())
    needed = seeds_for_reliability(of, adjust, 0, TARGET)
    fewer = [reliability(reduced(np.delete(effects, s, axis=0), here)) for s in range(len(effects))]
    known = [n for f in fewer if (n := seeds_for_reliability(f, adjust, 0, TARGET)) is not None]
    spread = f" ({shown(min(known))}–{shown(max(known))})" if known else ""
    cost = "–" if needed is None else two_digits(min(needed, MOST) * cells.seconds)
    return [f"{one:.2f}", f"{shown(needed)}{spread}", f"> {cost}" if needed and needed > MOST else cost]


def under(cells: Cells, place: int, pairs: Sequence[Pair]) -> str:
    reduction = reduced(at(cells.effects, place)[0], [pair_at(pair, place) for pair in pairs])
    floor = reduction.floors.of_mean(len(cells.effects))[0]
    return f"{(np.abs(reduction.effects.mean[:, 0]) <= floor).mean():.2f}"


def shown(seeds: int | None) -> str:
    return "–" if seeds is None else f">{MOST}" if seeds > MOST else str(seeds)


def two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"


def at(effects: Array, place: int) -> tuple[Array, list[int]]:
    """One step, (S, R', 1, m), of the removals that no seed has made diverge there, and which these are."""
    kept = [r for r in range(effects.shape[1]) if np.isfinite(effects[:, r, place]).all()]
    return effects[:, kept, place : place + 1], kept


def pair_at(pair: Pair, place: int) -> Pair:
    """One step of a pair, of the removals that did not diverge there."""
    rows = [i for i in range(len(pair.removals)) if np.isfinite(pair.sweep[i, place]).all()]
    one, other = (values[rows, place : place + 1] for values in (pair.sweep, pair.witness))
    return Pair(tuple(pair.removals[i] for i in rows), one, other)


def cosines(a: Array, b: Array) -> Array:
    """Over removals, (R, m) each: (m,)."""
    norms = np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0)
    out: Array = (a * b).sum(axis=0) / np.where(norms > 0, norms, 1)
    return out


@torch.no_grad()
def losses(workload: Workload) -> str:
    """What the final model has learned, and memorised."""
    workload.model.eval()
    both = [
        float(workload.loss(workload.outputs(workload.model, of), of).mean()) for of in (workload.train, workload.evals)
    ]
    return f"loss {both[0]:.3f} in training, {both[1]:.3f} in evaluation"


def measure(name: str, setting: Setting, seeds: int) -> Iterator[str]:
    """Print one workload's table; its rows of the second one are what it yields."""
    found: dict[tuple[str, float, str], Cells] = {}
    pairs: dict[tuple[str, float], list[Pair]] = {}
    for mode, weight in MODES:
        start = setting.start(mode, weight, "float32")
        single = trained(start, range(seeds), setting.replicas)
        double = trained(setting.start(mode, weight, "float64"), range(seeds), setting.replicas)
        found[mode, weight, "float32"], found[mode, weight, "float64"] = single, double
        pairs[mode, weight], size = witnesses(setting, start, single, double), len(start.train)
    optimizer = f"{setting.optimizer.name} {setting.optimizer.lr:g}"
    print(
        f"\n**{name}** ({optimizer}, batches of {setting.batch}, n = {size}; {seeds} seeds; {losses(setting.make())})\n"
    )
    print(
        "| step | mode | under | s a seed | eq. 17: one seed | for .95 | s for .95 | eq. 13: one seed | for .95 ",
        end="",
    )
    print("| s for .95 | float64, eq. 17: s a seed | one seed | for .95 | s for .95 |\n" + "|---" * 14 + "|")
    for place, step in enumerate(setting.steps):
        for mode, weight in MODES:
            single, double = (found[mode, weight, precision] for precision in ("float32", "float64"))
            known = pairs[mode, weight]
            columns = [under(single, place, known), f"{single.seconds:.2f}"]
            columns += row(single, place, known, "baseline") + row(single, place, known, "mean")
            columns += [f"{double.seconds:.2f}", *row(double, place, (), "baseline")]
            label = mode if weight == 1 else f"{mode}, w = {weight:g}"
            diverged = single.effects.shape[1] - len(at(single.effects, place)[1])
            label += f" ({diverged} of {REMOVALS} diverged)" if diverged else ""
            print(f"| {step} | {label} | {' | '.join(columns)} |")
    sys.stdout.flush()
    tripled = trained(setting.start("reweight", WIDER, "float64"), range(seeds), setting.replicas).effects
    one, wide = (found["reweight", weight, "float64"].effects for weight in (1.0, WIDE))
    for place, step in enumerate(setting.steps):
        yield f"| {name} | {step} | {linearity(tripled, one, place)} | {linearity(wide, one, place)} |"


def linearity(wide: Array, one: Array, place: int) -> str:
    """Cosine and size of effects at a removal weight against those at w = 1 with the same seeds."""
    kept = at(wide, place)[1]
    wide, one = wide[:, kept, place], one[:, kept, place]
    cosine = np.mean([cosines(x, y) for x, y in zip(wide, one, strict=True)])
    return f"{cosine:.3f} | {np.sqrt((wide**2).mean() / (one**2).mean()):.2f}"


def estimand(name: str, setting: Setting, seeds: int) -> None:
    """Print rows: do the modes agree?"""
    modes = ("drop", "mask", "reweight")
    effects = [
        trained(setting.start(mode, 1.0, "float32"), range(i * seeds, (i + 1) * seeds), setting.replicas).effects
        for i, mode in enumerate(modes)
    ]
    for place, step in enumerate(setting.steps):
        here = [reduced(at(of, place)[0]) for of in effects]
        for adjust, label in (("baseline", "eq. 17"), ("mean", "eq. 13")):
            means = [adjusted(of.effects.mean, adjust)[:, 0] for of in here]
            trusts = [reliability(of).trust(adjust, 0) for of in here]
            ceilings, ones = [t.ceiling() for t in trusts], [f"{t.reliability(1).mean():.3f}" for t in trusts]
            columns = [
                f"{cosines(means[i], means[j]).mean():.2f} of {(ceilings[i] * ceilings[j]).mean():.2f}"
                for i, j in ((1, 0), (2, 0), (2, 1))
            ]
            print(f"| {name} | {step} | {label} | {' | '.join(columns + ones)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help=f"workloads, of {', '.join(SETTINGS)} (default: all)")
    parser.add_argument("--seeds", type=int, help="default: 6, and 300 for --estimand")
    parser.add_argument("--estimand", action="store_true", help="do the modes agree? (default: cancer)")
    asked: Any = parser.parse_args()
    unknown = [name for name in asked.only if name not in SETTINGS]
    if unknown:
        parser.error(f"no workload {', '.join(unknown)}: use {', '.join(SETTINGS)}")
    seeds = asked.seeds or (300 if asked.estimand else 6)
    if seeds < 3:
        parser.error("--seeds must be at least 3: of two, none can be left out")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if asked.estimand:
        print(
            "| workload | step | adjust | mask to drop | reweight to drop | reweight to mask | one seed: drop ", end=""
        )
        print("| mask | reweight |\n" + "|---" * 9 + "|")
        for name in asked.only or ["cancer"]:
            estimand(name, SETTINGS[name], seeds)
        return
    rows = [row for name in asked.only or SETTINGS for row in measure(name, SETTINGS[name], seeds)]
    print("\n| workload | step | w = 3: cosine | size | w = 30: cosine | size |\n" + "|---" * 6 + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
