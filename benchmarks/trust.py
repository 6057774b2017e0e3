"""What a trustworthy attribution costs: seeds for a reliability of .95, by removal mode, precision and amount.

    python benchmarks/trust.py [concrete cancer cancer-adamw conv text text-adamw text-adamw-still] [--seeds 6]

Each workload is trained further from its final model with 15 of its training examples left out, one at a time, in drop,
mask, reweight, and reweight with a removal weight of 30; in float32 and again in float64 with the same seeds; g is read
on 20 evaluation examples at an early and at a late step. Markdown tables go to stdout, as `docs/cost-of-trust.md` has
them:

    removals    those that count: the cells of the others diverge with some seed
    one seed    reliability of one seed (eq. 17), the mean over evaluation examples: `fimo.orchestrator.tables.trust`
    for .95     seeds for a reliability of .95, extrapolated; in brackets least and most if any one seed is left out
    s a seed    seconds of processor time of the cells of a seed and their baseline, on one thread: the median seed
    s for .95   the product of the two: what modes are to be compared by
    under       share of pairs whose mean over the seeds is under the noise floor, measured by the float64 cells, or, if
                dropout draws other numbers in float64, from θᶠ moved by a unit in the last place (2 seeds, 5 removals)

The second table is of float64. Left: whether the modes have one estimand: a mode's mean over half of the seeds against
drop's over the other half, both ways, *of* the cosine that two such halves of one truth are expected to reach. Right:
how linear the response to the removal weight is: the cosine of effects at w = 3 and w = 30 to those at w = 1 (same
seeds; mean over seeds and evaluation examples), and the ratio of their root mean squares.

`text` is a two-layer BERT with dropout .1 that tells whether a token occurs; `-still` is without dropout.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fimo.orchestrator.tables.floor import Pair
from fimo.orchestrator.tables.groups import SeedGroups
from fimo.orchestrator.tables.planning import seeds_for_reliability
from fimo.orchestrator.tables.reduce import Reduction, SeedBlock, reduce
from fimo.orchestrator.tables.reliability import Reliability
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.shard import run_shard
from fimo.workers.start import Start, start_from
from fimo.workers.witness import MOVED, train_witness, witness_start
from fimo.workers.workload import Workload
from fimo.workers.workloads.tabular import concrete, mlp

Array = NDArray[np.float64]
REMOVALS, EVALS, TARGET = 15, 20, 0.95
WIDER, WIDE = 3.0, 30.0
MODES: list[tuple[str, float]] = [("drop", 1.0), ("mask", 1.0), ("reweight", 1.0), ("reweight", WIDE)]


# -- workloads ---------------------------------------------------------------------------------------------------------


def cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(outputs, batch["label"], reduction="none")


def fitted(workload: Workload, steps: int, lr: float) -> Workload:
    """A final model: some steps of Adam on random batches of 32."""
    train: Any = workload.train
    optimizer = torch.optim.Adam(workload.model.parameters(), lr)
    generator = torch.Generator().manual_seed(0)
    size = len(next(iter(train.values())))
    workload.model.train()
    for _ in range(steps):
        chosen = torch.randint(size, (32,), generator=generator)
        batch = {name: tensor[chosen] for name, tensor in train.items()}
        optimizer.zero_grad()
        workload.loss(workload.outputs(workload.model, batch), batch).mean().backward()
        optimizer.step()
    return workload


def classifier(model: nn.Module, x: Tensor, label: Tensor, train: int, steps: int, lr: float) -> Workload:
    parts = [{"x": x[rows], "label": label[rows]} for rows in (slice(0, train), slice(train, train + EVALS))]
    return fitted(Workload(model, *parts, lambda m, batch: m(batch["x"]), cross_entropy), steps, lr)


def cancer() -> Workload:
    """Breast cancer Wisconsin (scikit-learn), 455 rows to train on, and a perceptron 30-32-32-2."""
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, label = torch.tensor(features, dtype=torch.float32)[order], torch.tensor(labels)[order].long()
    x = (x - x[:455].mean(dim=0)) / x[:455].std(dim=0)
    torch.manual_seed(0)
    return classifier(mlp(30, 32, 32, 2), x, label, 455, 200, 1e-3)


def conv() -> Workload:
    """Ten-class digits of scikit-learn, 8 × 8, 300 of them to train on."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    head = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    return classifier(nn.Sequential(*features, *head), x, torch.tensor(labels).long(), 300, 300, 3e-3)


def bert(dropout: float) -> Workload:
    """A BERT of two layers that tells whether one of nine tokens of 115 occurs among twelve, 200 to train on."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=120,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    tokens = torch.randint(5, 120, (200 + EVALS, 12), generator=torch.Generator().manual_seed(1))
    labels = (tokens < 14).any(dim=1).long()
    parts = [{"ids": tokens[rows], "label": labels[rows]} for rows in (slice(0, 200), slice(200, None))]
    model = BertForSequenceClassification(config)
    return fitted(Workload(model, *parts, lambda m, batch: m(batch["ids"]).logits, cross_entropy), 200, 1e-3)


@dataclass(frozen=True)
class Setting:
    """A workload and how it is trained further; ``steps``: the early and the late amount."""

    make: Callable[[], Workload]
    optimizer: Optimizer
    batch: int
    steps: tuple[int, int]
    replicas: int = REMOVALS + 1

    def start(self, mode: str, weight: float, precision: str) -> Start:
        workload, settings = self.make(), self.settings(mode, weight, precision)
        dtype, device = (torch.float64 if precision == "float64" else torch.float32), torch.device("cpu")
        train, evals = (Examples(of, None, device, dtype) for of in (workload.train, workload.evals))
        return start_from(FunctionalModel(workload, None, device, dtype), train, evals.first(EVALS), settings)

    def settings(self, mode: Any, weight: float, precision: Any) -> FurtherTraining:
        at = Evaluate(at_steps=self.steps)
        return FurtherTraining(
            self.optimizer,
            self.batch,
            steps=self.steps[-1],
            evaluate=at,
            removal_mode=mode,
            removal_weight=weight,
            precision=precision,
        )


SETTINGS = {
    "concrete": Setting(concrete, Optimizer("sgd", 0.03), 128, (8, 80)),
    "cancer": Setting(cancer, Optimizer("sgd", 0.05), 32, (15, 150)),
    "cancer-adamw": Setting(cancer, Optimizer("adamw", 5e-4), 32, (15, 150)),
    "conv": Setting(conv, Optimizer("sgd", 0.05), 32, (10, 50)),
    "text": Setting(partial(bert, 0.1), Optimizer("sgd", 0.02), 32, (7, 28)),
    "text-adamw": Setting(partial(bert, 0.1), Optimizer("adamw", 2e-5), 32, (7, 28)),
    "text-adamw-still": Setting(partial(bert, 0.0), Optimizer("adamw", 2e-5), 32, (7, 28)),
}


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """Effects, float64 (S, R, T, m), and the seconds of processor time of the median seed."""

    effects: Array
    seconds: float


def removals_of(start: Start) -> list[tuple[int, ...]]:
    return [(i * len(start.train) // REMOVALS,) for i in range(REMOVALS)]


def effects_of(deltas: Tensor, weight: float) -> Array:
    """Of a shard's rows: removals, baseline, second baseline."""
    out: Array = ((deltas[:-2] - deltas[-2]) / weight).numpy()
    return out


def trained(start: Start, seeds: Sequence[int], replicas: int) -> Cells:
    effects, seconds = [], []
    for seed in seeds:
        began = time.process_time()
        run = run_shard(start, removals_of(start), seed, replicas, second=False)
        seconds.append(time.process_time() - began)
        effects.append(effects_of(run.deltas, start.settings.removal_weight))
    return Cells(np.stack(effects), statistics.median(seconds))


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
    spread = f" ({min(known)}–{max(known)})" if known else ""
    cost = "–" if needed is None else f"{needed * cells.seconds:.2f}"
    return f"{len(kept)} | {one:.2f} | {needed or '–'}{spread} | {cells.seconds:.2f} | {cost} | {under}"


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


def measure(name: str, setting: Setting, seeds: int) -> None:
    """Print one workload's tables."""
    found: dict[tuple[str, float, str], Cells] = {}
    pairs: dict[tuple[str, float], list[Pair]] = {}
    for mode, weight in MODES:
        start = setting.start(mode, weight, "float32")
        single = trained(start, range(seeds), setting.replicas)
        double = trained(setting.start(mode, weight, "float64"), range(seeds), setting.replicas)
        found[mode, weight, "float32"], found[mode, weight, "float64"] = single, double
        pairs[mode, weight] = witnesses(setting, start, single, double)
    optimizer = f"{setting.optimizer.name} {setting.optimizer.lr:g}"
    print(f"\n**{name}** ({optimizer}, batches of {setting.batch}; {seeds} seeds)\n")
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
        shown = [f"{value:.2f} of {ceiling:.2f}" for value, ceiling in same]
        shown += [linearity(wide, effects["reweight", 1.0], place) for wide in (tripled, effects["reweight", WIDE])]
        print(f"| {step} | {' | '.join(shown)} |", flush=True)


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
