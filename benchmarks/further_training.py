"""Steps per second and core of stacked further training over a plain one-run-at-a-time loop, measured side by side.

    python benchmarks/further_training.py [--rounds 5] [--epochs 40] [--only drop reweight bert]

Setting: the paper's Concrete (MLP 8-128-128-1, 927 training examples, batches of 128, SGD at 0.03, 100 removals, the
loss of 100 evaluation examples after every epoch), on one thread. The plain loop is what one would write first: a
``DataLoader`` with ``shuffle`` and a generator of its own, ``loss.backward()``, ``optimizer.step()``. It is not the
definition (``fimo.workers.definition.train_cell``), which says the same step by step but is written to be read: it
fetches examples one batch at a time by index, seeds every step and covers every removal mode, and would flatter us. The
numbers are held against the definition in the tests and by every sweep, not here.

Ours is a whole shard as a sweep computes it, its second baseline included in the time and not in the steps. Both are
warmed up, then alternate. Time is the process's CPU time, so that what else runs on the machine disturbs less. A
round's ratio is that of its two neighbours, and the median and the range over rounds are reported.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from fimo.workers.device import deterministic
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.shard import run_shard
from fimo.workers.stacking.size import measure_stack_size
from fimo.workers.start import Start, start_from
from fimo.workers.workload import Workload
from fimo.workers.workloads.tabular import concrete


@dataclass(frozen=True)
class Setting:
    workload: Workload
    settings: FurtherTraining
    removals: int
    plain_runs: int


def steps_of(setting: Setting, start: Start) -> int:
    per_epoch = -(-len(start.train) // setting.settings.batch_size)
    return setting.settings.steps or per_epoch * (setting.settings.epochs or 0)


def plain_run(setting: Setting, removed: int, seed: int) -> Tensor:
    """One further-training run as one would write it first; returns the deltas (T, m)."""
    settings, workload = setting.settings, setting.workload
    names, tensors = list(workload.train), list(workload.train.values())
    everything: TensorDataset | Subset[tuple[Tensor, ...]] = TensorDataset(*tensors)
    n, reweight = len(tensors[0]), settings.removal_mode == "reweight"
    gone = dict(zip(names, (t[[removed]] for t in tensors), strict=True))
    data = everything if reweight else Subset(everything, [i for i in range(n) if i != removed])
    loader = DataLoader(data, settings.batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))
    model = copy.deepcopy(workload.model)
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[settings.optimizer.name]
    optimizer = kind(model.parameters(), lr=settings.optimizer.lr)

    def evaluate() -> Tensor:
        model.eval()
        with torch.no_grad():
            values = workload.loss(workload.outputs(model, workload.evals), workload.evals)
        model.train()
        return values

    start, deltas, step = evaluate(), [], 0
    last = settings.steps or (settings.epochs or 0) * len(loader)
    while step < last:
        for rows in loader:
            batch = dict(zip(names, rows, strict=True))
            optimizer.zero_grad()
            loss = workload.loss(workload.outputs(model, batch), batch).mean()
            if reweight:
                loss = loss - workload.loss(workload.outputs(model, gone), gone).sum() / n
            loss.backward()
            if settings.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            optimizer.step()
            step += 1
            if step == last:
                break
        deltas.append(evaluate() - start)
    return torch.stack(deltas)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall-clock seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def compare(name: str, setting: Setting, rounds: int) -> None:
    prepared = start_from(
        FunctionalModel(setting.workload),
        Examples(setting.workload.train),
        Examples(setting.workload.evals),
        setting.settings,
    )
    removals = [(9 * i % len(prepared.train),) for i in range(setting.removals)]
    size, _ = measure_stack_size(prepared, setting.removals + 1)
    cells, steps = setting.removals + 1, steps_of(setting, prepared)
    plain_run(setting, 0, 0)
    run_shard(prepared, removals[: 2 * size], 0, size)
    ratios, walls, ours, theirs = [], [], [], []
    for seed in range(rounds):
        plain = timed(lambda s=seed: [plain_run(setting, 9 * i, s) for i in range(setting.plain_runs)])
        stacked = timed(lambda s=seed: run_shard(prepared, removals, s, size))
        theirs.append(plain[0] / setting.plain_runs / steps)
        ours.append(stacked[0] / cells / steps)
        ratios.append(theirs[-1] / ours[-1])
        walls.append(plain[1] / setting.plain_runs / (stacked[1] / cells))
    print(
        f"{name:10} {statistics.median(ratios):5.2f}x (rounds {min(ratios):.2f} to {max(ratios):.2f}; wall clock "
        f"{statistics.median(walls):.2f}x)   plain {1e3 * statistics.median(theirs):.3f} ms, ours "
        f"{1e3 * statistics.median(ours):.3f} ms a step and replica, in stacks of {size}",
        flush=True,
    )


def paper(mode: str, epochs: int) -> Setting:
    workload = concrete()
    evals = {name: tensor[:100] for name, tensor in workload.evals.items()}
    settings = FurtherTraining(
        Optimizer("sgd", lr=0.03), 128, epochs=epochs, removal_mode=mode, evaluate=Evaluate(every_epochs=1)
    )
    kept = Workload(workload.model, workload.train, evals, workload.outputs, workload.loss)
    return Setting(kept, settings, removals=100, plain_runs=5)


def bert() -> Setting:
    """Two layers, 64 wide, 24 tokens, dropout on, AdamW, clipped: for orientation, not the paper's size."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(  # type: ignore[call-arg]
        vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, num_labels=2
    )
    tokens, labels = torch.randint(1, 200, (264, 24)), torch.randint(2, (264,))
    data = {"tokens": tokens, "mask": torch.ones_like(tokens), "label": labels}
    workload = Workload(
        BertForSequenceClassification(config),
        {name: tensor[:200] for name, tensor in data.items()},
        {name: tensor[200:] for name, tensor in data.items()},
        outputs=lambda model, batch: model(input_ids=batch["tokens"], attention_mask=batch["mask"]).logits,
        loss=lambda logits, batch: nn.functional.cross_entropy(logits, batch["label"], reduction="none"),
    )
    settings = FurtherTraining(Optimizer("adamw", lr=1e-4), 32, epochs=1, clip_norm=1.0)
    return Setting(workload, settings, removals=7, plain_runs=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--only", nargs="*", choices=["drop", "reweight", "bert"], default=["drop", "reweight", "bert"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with deterministic(torch.device("cpu")):
        for name in asked.only:
            compare(name, bert() if name == "bert" else paper(name, asked.epochs), asked.rounds)


if __name__ == "__main__":
    main()
