"""What a trustworthy attribution costs: seeds for a reliability of .95, by removal mode, precision and amount.

    python benchmarks/trust.py [concrete cancer cancer-adamw conv text text-adamw memorised memorised-still]

Each workload is trained further from its final model with 15 of its training examples left out, one at a time, in drop,
mask, reweight, and reweight with a removal weight of 30; in float32 and again in float64 with the same seeds; g is read
on 20 evaluation examples at an early and at a late step. Markdown tables go to stdout, as `docs/cost-of-trust.md` has
them:

    removals    those that count: the cells of the others diverge with some seed
    one seed    reliability of one seed (eq. 17), the mean over evaluation examples: `fimo.orchestrator.tables.trust`
    for .95     seeds for a reliability of .95, extrapolated; in brackets least and most if any one seed is left out;
                beyond 1000 the measured seeds say no more than that
    s a seed    seconds of processor time of the cells of a seed and their baseline, on one thread: the median seed
    s for .95   the product of the two: what modes are to be compared by
    under       share of pairs whose mean over the seeds is under the noise floor, measured by the float64 cells, or, if
                dropout draws other numbers in float64, from θᶠ moved by a unit in the last place (2 seeds, 5 removals)

The second table is of float64. Left: whether the modes have one estimand: a mode's mean over half of the seeds against
drop's over the other half, both ways, *of* the cosine that two such halves of one truth are expected to reach. Right:
how linear the response to the removal weight is: the cosine of effects at w = 3 and w = 30 to those at w = 1 (same
seeds; mean over seeds and evaluation examples), and the ratio of their root mean squares.

`text` and `memorised` are a two-layer BERT with dropout .1. A tenth of the labels that `text` is trained on are wrong.
`memorised` has learned its examples by heart, and not the task. `-still` is without dropout.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from small import SETTINGS, Cells, Setting, effects_of, removals_of, trained

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
    blocks, reduction = reduce(blocks, *effects.shape[1:], witnesses=pairs)
    for _ in blocks:
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


def row(cells: Cells, place: int, pairs: Sequence[Pair]) -> str:
    """removals | one seed | for .95 | s a seed | s for .95 | under."""
    effects, kept = at(cells.effects, place)
    here = [pair_at(pair, place) for pair in pairs]
    reduction = reduced(effects, here)
    of = reliability(reduction)
    defined = ~of.without("baseline")[0]
    under = "–"
    if here:
        floor = reduction.floors.of_mean(len(effects))[0]
        under = f"{(np.abs(reduction.effects.mean[:, 0]) <= floor).mean():.2f}"
    if not defined.any():
        return f"{len(kept)} | – | – | {cells.seconds:.2f} | – | {under}"
    one = float(of.trust("baseline", 0).reliability(1)[defined].mean())
    needed = seeds_for_reliability(of, "baseline", 0, TARGET)
    fewer = [reliability(reduced(np.delete(effects, s, axis=0), here)) for s in range(len(effects))]
    known = [n for f in fewer if (n := seeds_for_reliability(f, "baseline", 0, TARGET)) is not None]
    spread = f" ({shown(min(known))}–{shown(max(known))})" if known else ""
    cost = "–" if needed is None else f"{'> ' * (needed > MOST)}{min(needed, MOST) * cells.seconds:.2g}"
    return f"{len(kept)} | {one:.2f} | {shown(needed)}{spread} | {cells.seconds:.2f} | {cost} | {under}"


def shown(seeds: int | None) -> str:
    return "–" if seeds is None else f"> {MOST}" if seeds > MOST else str(seeds)


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


def agreement(a: Array, b: Array, place: int) -> tuple[float, float]:
    """Cosine of means over opposite halves of the seeds, and what two halves of one truth reach."""
    both = [r for r in at(a, place)[1] if r in at(b, place)[1]]
    a, b, half = a[:, both, place], b[:, both, place], len(a) // 2
    opposite = (a[:half], b[half:]), (a[half:], b[:half])
    cosine = np.mean([cosines(x.mean(axis=0), y.mean(axis=0)) for x, y in opposite])
    ceilings = [reliability(reduced(x[:, :, None])).trust("baseline", 0).ceiling(half) for x in (a, b)]
    return float(cosine), float(np.mean(ceilings[0] * ceilings[1]))


@torch.no_grad()
def losses(workload: Workload) -> str:
    """What the final model has learned, and memorised."""
    workload.model.eval()
    both = [
        float(workload.loss(workload.outputs(workload.model, of), of).mean()) for of in (workload.train, workload.evals)
    ]
    return f"loss {both[0]:.3f} in training, {both[1]:.3f} in evaluation"


def measure(name: str, setting: Setting, seeds: int) -> None:
    """Print one workload's tables."""
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
    print("| step | mode | precision | removals | one seed | for .95 | s a seed | s for .95 | under |")
    print("|---|---|---|---|---|---|---|---|---|")
    for place, step in enumerate(setting.steps):
        for (mode, weight, precision), cells in found.items():
            label = mode if weight == 1 else f"{mode}, w = {weight:g}"
            known = pairs[mode, weight] if precision == "float32" else ()
            print(f"| {step} | {label} | {precision} | {row(cells, place, known)} |")
    tripled = trained(setting.start("reweight", WIDER, "float64"), range(seeds), setting.replicas).effects
    print("\n| step | mask to drop | reweight to drop | w = 30 to drop | w = 3 to w = 1 | w = 30 to w = 1 |")
    print("|---|---|---|---|---|---|")
    effects = {(mode, weight): found[mode, weight, "float64"].effects for mode, weight in MODES}
    for place, step in enumerate(setting.steps):
        same = [agreement(effects[of], effects[MODES[0]], place) for of in MODES[1:]]
        columns = [f"{value:.2f} of {ceiling:.2f}" for value, ceiling in same]
        columns += [linearity(wide, effects["reweight", 1.0], place) for wide in (tripled, effects["reweight", WIDE])]
        print(f"| {step} | {' | '.join(columns)} |", flush=True)


def linearity(wide: Array, one: Array, place: int) -> str:
    """Cosine and size of effects at a removal weight against those at w = 1 with the same seeds."""
    kept = at(wide, place)[1]
    wide, one = wide[:, kept, place], one[:, kept, place]
    cosine = np.mean([cosines(x, y) for x, y in zip(wide, one, strict=True)])
    return f"{cosine:.3f}, size {np.sqrt((wide**2).mean() / (one**2).mean()):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help=f"workloads, of {', '.join(SETTINGS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=6)
    asked: Any = parser.parse_args()
    unknown = [name for name in asked.only if name not in SETTINGS]
    if unknown:
        parser.error(f"no workload {', '.join(unknown)}: use {', '.join(SETTINGS)}")
    if asked.seeds < 4:
        parser.error("--seeds must be at least 4: halves of two, which say how noisy they are")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in asked.only or SETTINGS:
        measure(name, SETTINGS[name], asked.seeds)


if __name__ == "__main__":
    main()
