"""Cost beside score for every estimator: on Concrete, on a small convolutional network and on a small BERT.

    python benchmarks/estimators.py [--only concrete conv bert] [--optimizer sgd|adamw] [--seeds 3] [--budget 120]

Each model is trained further in the reweight mode with its removals left out, and every estimator (those of the default
set that apply, `unrolled` and `mirrored` on seeds outside of the gold standard's) is scored by the mean over evaluation
examples of the cosine over removals, at every recorded step. One table a model:

    s         seconds, wall clock, this machine
    gradients the same in gradients of one training example, timed in the same run
    counted   seconds that the estimator's own counts foretell (`fimo.estimators.counts`), which the budget goes by
    t = …     cosines

An estimator that is counted to take longer than the budget is not run.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import torch
from small import cross_entropy, fitted
from torch import nn

from fimo.estimators import Problem, choose
from fimo.estimators.rates import Rates
from fimo.workers.errors import FimoError
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.shard import run_shard
from fimo.workers.start import start_from
from fimo.workers.workload import Workload
from fimo.workers.workloads.tabular import concrete

STEPS = {"concrete": (8, 40, 160), "conv": (6, 30, 90), "bert": (4, 8, 16)}
RATES = {"concrete": (0.03, 5e-4), "conv": (0.05, 5e-4), "bert": (0.02, 2e-5)}


def conv() -> Workload:
    """Ten-class digits of scikit-learn, 8 × 8, 300 of them to train on."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    cut = {"x": x[:300], "label": y[:300]}, {"x": x[300:340], "label": y[300:340]}
    return fitted(Workload(model, *cut, lambda m, batch: m(batch["x"]), cross_entropy), 300, 3e-3)


def bert() -> Workload:
    """A BERT of two layers that tells whether a token occurs; no dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=120,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    tokens = torch.randint(5, 120, (240, 12), generator=torch.Generator().manual_seed(1))
    labels = (tokens < 14).any(dim=1).long()
    train, evals = ({"ids": tokens[s], "label": labels[s]} for s in (slice(0, 200), slice(200, 220)))
    model = BertForSequenceClassification(config)
    return fitted(Workload(model, train, evals, lambda m, batch: m(batch["ids"]).logits, cross_entropy), 200, 1e-3)


def measure(name: str, workload: Workload, optimizer: str, seeds: int, budget: float) -> None:
    """Print one model's table."""
    lr = RATES[name][optimizer == "adamw"]
    settings = FurtherTraining(
        Optimizer(optimizer, lr),  # type: ignore[arg-type]
        32 if name != "concrete" else 128,
        steps=STEPS[name][-1],
        removal_mode="reweight",
        evaluate=Evaluate(at_steps=STEPS[name]),
    )
    model, train = FunctionalModel(workload), Examples(workload.train)
    evals = Examples(workload.evals).first(20 if name == "bert" else 40)
    removals = [(i * len(train) // 30,) for i in range(30)]
    start = start_from(model, train, evals, settings)
    began = time.perf_counter()
    runs = [run_shard(start, removals, seed, 16) for seed in range(seeds)]
    spent = time.perf_counter() - began
    gold = torch.stack([run.deltas[:-2] - run.deltas[-2] for run in runs]).mean(dim=0)
    problem = Problem(model, train, evals, removals, settings, seeds=range(seeds, seeds + 2), start=start, replicas=16)
    unit = Rates(problem).gradient
    print(f"\n{name}, {optimizer} {lr:g}: the gold standard took {spent:.1f} s ({seeds} seeds × {len(removals)} cells)")
    print(f"{'':36} {'s':>7} {'gradients':>10} {'counted':>8}  " + "  ".join(f"t = {t:<4}" for t in STEPS[name]))
    chosen, others = choose(problem)
    for estimator in chosen:
        label = estimator.name + (" (optimizer)" if estimator.params().get("preconditioner") else "")
        counted = Rates(problem).seconds(estimator.work(problem))
        if counted > budget:
            print(f"{label:36} {'':7} {'':10} {counted:8.1f}  over the budget")
            continue
        began = time.perf_counter()
        try:
            estimate = estimator.estimate(problem)
        except FimoError as error:
            print(f"{label:36} {str(error)[:110]}")
            continue
        seconds, shown = time.perf_counter() - began, []
        for place, step in enumerate(STEPS[name]):
            values = estimate.values
            if estimate.steps is not None:
                values = values[estimate.steps.index(step)] if step in estimate.steps else values[0] * torch.nan
            shown.append(f"{float(nn.functional.cosine_similarity(gold[:, place], values, dim=0).mean()):8.3f}")
        print(f"{label:36} {seconds:7.2f} {seconds / unit:10.0f} {counted:8.1f}  " + "  ".join(shown), flush=True)
    for left_out, why in others:
        print(f"{left_out:36} {why}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(STEPS), default=list(STEPS))
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=120.0, help="counted seconds beyond which none is run")
    asked: Any = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in asked.only:
        workload = {"concrete": concrete, "conv": conv, "bert": bert}[name]()
        measure(name, workload, asked.optimizer, asked.seeds, asked.budget)


if __name__ == "__main__":
    main()
