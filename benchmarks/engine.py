"""The engine against the plain loop and the machine's limit, on the same cells in the same run: a Markdown table.

    python benchmarks/engine.py [--only concrete-drop bert-small …] [--rounds 3] [--to benchmarks/RESULTS.md]

*plain* is what one would write first: a model, a torch optimizer, a seeded ``RandomSampler``, ``loss.backward()``, a
cell at a time, batches taken out of the tensors at once. It is leaner than ``fimo.workers.definition.train_cell``,
which is written to be read. *ours* is a shard as a sweep computes it, in stacks of the size that a sweep would choose;
of BERT one at a time, since choosing takes minutes. Both give deltas: in float64, over fewer epochs, they must agree to
1e-8 of the largest. In float32 *apart* is rounding: an example of Concrete may cross a kink of ReLU in one and not in
the other, which moves deltas by up to a hundredth, as far as the plain loop is from float64 itself. Both are
warmed up and alternate; time is the process's own CPU time on one thread, and a row is the median of its rounds.

*limit* is what the matrix products of the plain run alone would take, those of its evaluations included: every product
that the run does is recorded with its shape (a convolution as the product of its unfolded image), and products of these
shapes are timed in stacks of the chosen size, taking turns, by ``torch.bmm`` and by oneDNN's batched product. *limit*
is by the faster of both at each shape, *by bmm* by ``torch.bmm`` alone, by which torch itself multiplies. *GFLOP/s* are
their operations in these times. Ours may pass the limit where texts are padded: it cuts what is padding, and the limit
does not.

Nothing is downloaded: Concrete ships, images and texts are drawn, models of transformers have random weights.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from recorded import told
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import RandomSampler

from fimo.workers.amounts import Removal
from fimo.workers.device import deterministic, device_name
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.shard import run_shard
from fimo.workers.stacking.fused import fused
from fimo.workers.stacking.layouts import layout_of
from fimo.workers.stacking.size import measure_stack_size
from fimo.workers.stacking.together import start_of
from fimo.workers.workload import Workload
from fimo.workers.workloads.cifar10 import ResNet9
from fimo.workers.workloads.cifar10 import outputs as image_outputs
from fimo.workers.workloads.tabular import concrete, cross_entropy

Shape = tuple[int, int, int]
"""(m, k, n) of a product of (m, k) and (k, n)."""

HEADING = "Further training: the plain loop, the engine and the limit"
AGREE = 1e-8
"""Most that a delta may differ by in float64, of the largest delta."""

aten = torch.ops.aten


@dataclass(frozen=True)
class Case:
    """Cells of a workload; the plain loop trains the last ``plain`` of them, the baseline among them.

    ``stack``: replicas trained together; None = as many as a sweep would choose.
    """

    what: str
    workload: Workload
    settings: FurtherTraining
    removals: int
    plain: int
    stack: int | None = None


def plain_cell(case: Case, removal: Removal, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Deltas (T, m) of one cell, float64, trained in ``dtype``."""
    workload, settings = case.workload, case.settings
    train: Any = _in(workload.train, dtype)
    model, n = copy.deepcopy(workload.model).to(dtype), len(next(iter(train.values())))
    optimizer = settings.optimizer.build(list(model.parameters()))
    reweight = settings.removal_mode == "reweight"
    gone = {name: t[list(removal)] for name, t in train.items()}
    sampler = RandomSampler(range(n), generator=torch.Generator().manual_seed(seed))

    def losses(batch: dict[str, Tensor]) -> Tensor:
        return workload.loss(workload.outputs(model, batch), batch)

    def evaluate() -> Tensor:
        model.eval()
        evals: Any = _in(workload.evals, dtype)
        with torch.no_grad():
            wide = {name: t.double() if t.is_floating_point() else t for name, t in evals.items()}
            values = workload.loss(workload.outputs(model, evals).double(), wide)
        model.train()
        return values

    start, deltas, step = evaluate(), list[Tensor](), 0
    last = settings.steps or math.inf
    for _ in range(settings.epochs or n):
        order = torch.tensor([i for i in sampler if reweight or i not in removal])
        for indices in order.split(settings.batch_size):
            optimizer.zero_grad()
            loss = losses({name: t[indices] for name, t in train.items()}).mean()
            if reweight and removal:
                loss = loss - losses(gone).sum() / n
            loss.backward()
            if settings.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            optimizer.step()
            step += 1
            if step == last:
                return torch.stack([*deltas, evaluate() - start])
        if settings.epochs is not None:
            deltas.append(evaluate() - start)
    return torch.stack(deltas)


def _in(tensors: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def apart_in_float64(case: Case, removals: Sequence[Removal], size: int) -> float:
    """How far the engine's deltas are from the plain loop's, of the largest; a few cells, and epochs."""
    settings = replace(case.settings, precision="float64", epochs=min(3, case.settings.epochs or 0) or None)
    short, some = replace(case, settings=settings), list(removals[: max(1, min(3, size - 1))])
    own = run_shard(start_of(case.workload, settings), some, 0, size, second=False).deltas[:-1]
    theirs = torch.stack([plain_cell(short, removal, 0, torch.float64) for removal in [*some, ()]])
    return float((own - theirs).abs().max() / theirs.abs().max())


class Products(TorchDispatchMode):
    """Counts the matrix products of what runs inside, by (stack, shape)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[int, Shape]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (aten.mm.default, aten.addmm.default):
            a, b = args[-2:]
            self.found[1, (a.shape[0], a.shape[1], b.shape[1])] += 1
        elif func in (aten.bmm.default, aten.baddbmm.default):
            a, b = args[-2:]
            self.found[a.shape[0], (a.shape[1], a.shape[2], b.shape[2])] += 1
        elif func is aten.convolution.default:
            self._convolution(args[1], out, 1)
        elif func is aten.convolution_backward.default:
            # The weight's gradient always; the image's where it is asked for.
            self._convolution(args[2], args[0], sum(args[-1][:2]))
        return out

    def _convolution(self, weight: Tensor, result: Tensor, products: int) -> None:
        places = result.numel() // result.shape[1]
        self.found[1, (places, weight[0].numel(), weight.shape[0])] += products


def products_of(run: Callable[[], object]) -> Counter[tuple[int, Shape]]:
    with Products() as products:
        run()
    return products.found


def seconds_of(found: Counter[tuple[int, Shape]], replicas: int, budget_s: float = 5.0) -> tuple[float, float]:
    """CPU seconds a replica of all products, in stacks of ``replicas``: each one's best of several.

    Products of different shapes take turns, as they do in a step: none finds its operands in the cache.

    Returns:
        (each product by the faster of torch's and oneDNN's, all of them by torch's).
    """
    operands = {
        key: (torch.randn(replicas * key[0], *key[1][:2]), torch.randn(replicas * key[0], *key[1][1:])) for key in found
    }
    kernels: dict[tuple[int, Shape], list[Callable[[Tensor, Tensor], Tensor]]] = {}
    for key, both in operands.items():
        onednn = fused(*map(layout_of, both))
        kernels[key] = [torch.bmm] if onednn is None else [torch.bmm, onednn]
    times = {key: [list[float]() for _ in kernels[key]] for key in found}
    began, tries = time.process_time(), 0
    while tries < 3 or (time.process_time() - began < budget_s and tries < 100):
        tries += 1
        for key, (a, b) in operands.items():
            for kernel, taken in zip(kernels[key], times[key], strict=True):
                taken.append(timed(lambda a=a, b=b, k=kernel: k(a, b)))
    best = {key: [min(taken) for taken in times[key]] for key in found}
    fastest, torchs = (sum(count * of(best[key]) for key, count in found.items()) for of in (min, itemgetter(0)))
    return fastest / replicas, torchs / replicas


def timed(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def measured(name: str, case: Case, rounds: int) -> str:
    """A row of the table."""
    start = start_of(case.workload, case.settings)
    n = len(start.train)
    removals: list[Removal] = [(7 * i % n,) for i in range(case.removals)]
    size = case.stack or measure_stack_size(start, case.removals + 1)[0]
    chosen: list[Removal] = [*removals, ()][-case.plain :]
    per_epoch = -(-n // case.settings.batch_size)
    steps = case.settings.steps or per_epoch * (case.settings.epochs or 0)
    found = products_of(lambda: plain_cell(case, removals[0], 0))
    run_shard(start, removals[:size], 0, size, second=False)
    plain, ours, ratios, apart = list[float](), list[float](), list[float](), 0.0
    for seed in range(rounds):
        theirs = list[Tensor]()
        plain.append(timed(lambda s=seed, t=theirs: t.extend(plain_cell(case, r, s) for r in chosen)))
        plain[-1] *= 1e3 / len(chosen) / steps
        shards: list[Any] = []
        ours.append(timed(lambda s=seed, t=shards: t.append(run_shard(start, removals, s, size, second=False))))
        ours[-1] *= 1e3 / (len(removals) + 1) / steps
        ratios.append(plain[-1] / ours[-1])
        own = shards[0].deltas[:-1][-len(chosen) :]
        apart = max(apart, float((own - torch.stack(theirs)).abs().max() / own.abs().max()))
    wide = apart_in_float64(case, removals, size)
    with torch.no_grad():
        seconds, by_bmm = seconds_of(found, size)
    flop = sum(2 * count * stack * math.prod(shape) for (stack, shape), count in found.items())
    limit, torchs, ms = 1e3 * seconds / steps, 1e3 * by_bmm / steps, statistics.median(ours)
    row = (
        f"| {name}: {case.what} | {case.removals + 1} × {steps} | {size} | {statistics.median(plain):.3g} | {ms:.3g} | "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {limit:.3g} | {limit / ms:.0%} | "
        f"{flop / seconds / 1e9:.0f} | {torchs:.3g} | {torchs / ms:.0%} | {flop / by_bmm / 1e9:.0f} | "
        f"{wide:.0e} | {apart:.0e} |"
    )
    print(row, flush=True)
    if not wide <= AGREE:
        raise SystemExit(f"{name}: in float64 deltas differ by {wide:.1e} of the largest, more than {AGREE:.0e}")
    return row


def tabular(mode: Any) -> Case:
    workload = concrete()
    evals = {name: t[:100] for name, t in workload.evals.items()}  # type: ignore[attr-defined]
    kept = Workload(workload.model, workload.train, evals, workload.outputs, workload.loss)
    settings = FurtherTraining(
        Optimizer("sgd", lr=0.03), 128, epochs=40, removal_mode=mode, evaluate=Evaluate(every_epochs=1)
    )
    return Case(f"Concrete, MLP 8-128-128-1, batch 128, {mode}", kept, settings, removals=95, plain=5)


def image() -> Case:
    torch.manual_seed(0)
    drawn = torch.randint(256, (100, 3, 32, 32), dtype=torch.uint8)
    label = torch.randint(10, (100,))
    train, evals = ({"x": drawn[part], "y": label[part]} for part in (slice(0, 80), slice(80, None)))
    settings = FurtherTraining(Optimizer("sgd", lr=1e-3), 32, epochs=1, removal_mode="drop")
    workload = Workload(ResNet9(16), train, evals, image_outputs, cross_entropy)
    return Case("ResNet-9 of width 16, 3 × 32 × 32, batch 32, batch norm, drop", workload, settings, 3, 2)


def text(what: str, steps: int, removals: int, plain: int, batch: int, **shape: int) -> Case:
    """Sentences as long as SST-2's, padded to the longest as its tokenizer pads them; no dropout."""
    from text import outputs, sentences
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(  # type: ignore[call-arg]
        num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager", **shape
    )
    data = sentences(200, 1), sentences(20, 2)
    for part in data:
        part["y"] = part.pop("label")
    settings = FurtherTraining(
        Optimizer("adamw", lr=1e-5),
        batch,
        steps=steps,
        clip_norm=1.0,
        removal_mode="reweight",
        evaluate=Evaluate(every_steps=steps),
    )
    workload = Workload(BertForSequenceClassification(config), *data, outputs, cross_entropy)
    return Case(f"{what}, batch {batch}, AdamW, clipped, reweight", workload, settings, removals, plain, stack=1)


CASES: dict[str, Callable[[], Case]] = {
    "concrete-drop": lambda: tabular("drop"),
    "concrete-reweight": lambda: tabular("reweight"),
    "resnet9": image,
    "bert-small": lambda: text(
        "BERT, 4 layers of 512", 3, 2, 2, 16, hidden_size=512, num_hidden_layers=4, num_attention_heads=8,
        intermediate_size=2048,
    ),
    "bert-base": lambda: text("BERT, 12 layers of 768", 2, 1, 1, 8),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--to", type=Path, help="a Markdown file to keep the table in, under a heading of its own")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    before = os.getloadavg()[0]
    with deterministic(torch.device("cpu")):
        rows = [measured(name, CASES[name](), asked.rounds) for name in asked.only]
    lines = [
        f"`python benchmarks/engine.py`, {time.strftime('%Y-%m-%d', time.gmtime())}. "
        f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores, torch {torch.__version__}, Python "
        f"{platform.python_version()}; load average {before:.1f} before and {os.getloadavg()[0]:.1f} after. "
        "CPU milliseconds a step and cell, evaluation included.",
        "",
        "| | cells × steps | stack | plain | ours | plain / ours | limit | limit / ours | GFLOP/s "
        "| by bmm | by bmm / ours | GFLOP/s | apart, float64 | apart |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    told(HEADING, lines, asked.to)


if __name__ == "__main__":
    main()
