"""Further training on a GPU: the CPU's numbers, and how fast they are had; a Markdown table.

    make bench-gpu            or: PYTHONPATH=.links python benchmarks/gpu.py [--only concrete …] [--full] [--to FILE]

Needs torch, numpy and safetensors alone (BERT: transformers), no Ray. For each workload and precision

* *apart*: the largest difference of a delta from ``fimo.workers.definition.train_cell`` on the CPU, of the largest
  delta or measure, whichever is larger: what rounds is the measure. More than 1e-5 makes the program fail, at its end.
* *run*, *launched*: milliseconds a step and cell when kernels are called one by one, and when a recorded step is
  launched (``fimo.workers.stacking.captured``); the two deltas agree too. A dash: this workload is not recorded.
* *stack*: the size that a sweep would choose, and whether replicas are computed each by itself, on streams; *seeds*:
  how many seeds' shards are trained in it together.
* *limit*: what the step's matrix products alone take on this GPU, in stacks of that size.

``--full`` runs the paper's whole Concrete grid: 101 cells × 100 seeds × 500 epochs. ``--device cpu --quick`` rehearses
the program where there is no GPU, with numbers that say nothing.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from engine import Case, image, plain_cell, products_of, tabular, text
from recorded import told
from torch import Tensor

from fimo.workers.amounts import Removal
from fimo.workers.definition import train_cell
from fimo.workers.device import deterministic, device_name, forget_peak, peak
from fimo.workers.joined import run_shards
from fimo.workers.settings import Evaluate
from fimo.workers.stacking.size import Stacks, measure_stacks
from fimo.workers.stacking.together import start_of
from fimo.workers.start import Start

HEADING = "Further training on a GPU"
AGREE = 1e-5
"""Most that a delta may differ by from the CPU's, of the largest delta or measure."""


@dataclass(frozen=True)
class Asked:
    device: torch.device
    quick: bool


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall seconds until the device has done the work."""
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def apart(case: Case, start: Start, epochs: int) -> float:
    """How far the device's deltas are from the definition's on the CPU, over a few cells of two seeds."""
    last = min(12, case.settings.steps or 12) if case.settings.steps is not None else None
    few = replace(case.settings, steps=last, epochs=None if last else epochs, evaluate=Evaluate(every_steps=4))
    shards: list[tuple[Sequence[Removal], int]] = [([(7,), (14,)], seed) for seed in (0, 1)]
    got = run_shards(replace(start, settings=replace(few, removal_mode=start.settings.removal_mode)), shards, 6)
    worst, largest = 0.0, float(start.at_final.abs().max())
    results = chain.from_iterable(some for _, some in got)
    for result, (removals, seed) in zip(results, shards, strict=True):
        for row, removal in enumerate([*removals, ()]):
            with deterministic(torch.device("cpu")):
                plain = train_cell(case.workload, few, removal, seed).deltas
            worst = max(worst, float((result.deltas[row] - plain).abs().max()))
            largest = max(largest, float(plain.abs().max()))
    return worst / largest


def limit_ms(case: Case, size: int, steps: int, asked: Asked, dtype: torch.dtype) -> float:
    """Milliseconds a step and cell of the matrix products alone, in stacks of ``size``, one after another."""
    found = products_of(lambda: plain_cell(case, (0,), 0))
    total = 0.0
    for (stack, (m, k, n)), count in found.items():
        one = torch.randn(size * stack, m, k, device=asked.device, dtype=dtype)
        other = torch.randn(size * stack, k, n, device=asked.device, dtype=dtype)
        tries = 1 if asked.quick else 20
        torch.bmm(one, other)

        def work(a: Tensor = one, b: Tensor = other, times: int = tries) -> None:
            for _ in range(times):
                torch.bmm(a, b)

        total += count * seconds(work, asked.device) / tries
    return 1e3 * total / size / steps


def measured(name: str, case: Case, precision: Any, asked: Asked) -> tuple[str, float]:
    """A row of the table, and its *apart*."""
    epochs = 2 if asked.quick else case.settings.epochs
    settings = replace(case.settings, precision=precision, epochs=epochs if case.settings.epochs else None)
    case = replace(case, settings=settings, removals=4 if asked.quick else case.removals)
    start = start_of(case.workload, settings, device=asked.device)
    off = apart(case, start, 2)
    n = len(start.train)
    removals: list[Removal] = [(7 * i % n,) for i in range(case.removals)]
    cells = len(removals) + 1
    several = start.joins and not asked.quick
    stacks = Stacks(case.stack) if case.stack else measure_stacks(start, (20 if several else 1) * cells, cells)
    size, start = stacks.replicas, start.using(replace(start.engine, abreast=stacks.abreast))
    seeds = max(1, size // cells) if start.joins else 1
    shards: list[tuple[Sequence[Removal], int]] = [(removals, seed) for seed in range(seeds)]
    steps = settings.steps or -(-n // settings.batch_size) * (settings.epochs or 0)
    per = 1e3 / (cells * seeds * steps)
    plain, took = start.using(replace(start.engine, replay=False)), dict[str, float]()
    results: dict[str, list[Tensor]] = {}
    forget_peak(asked.device)
    for way, own in (("run", plain), ("launched", start)):
        if way == "launched" and own.captures is None:
            continue

        def work(way: str = way, own: Start = own) -> None:
            results[way] = [result.deltas for _, some in run_shards(own, shards, size) for result in some]

        work()
        took[way] = per * seconds(work, asked.device)
    if "launched" in results:
        both = zip(results["launched"], results["run"], strict=True)
        off = max(off, *(float((a - b).abs().max() / b.abs().max()) for a, b in both))
    limit = limit_ms(case, size, steps, asked, getattr(torch, precision))
    best = min(took.values())
    row = (
        f"| {name}: {case.what} | {precision} | {cells} × {seeds} × {steps} | "
        f"{size}{' on streams' if stacks.abreast else ''} | {seeds} | {took['run']:.4g} | "
        f"{took.get('launched', math.nan):.4g} | {limit:.4g} | {limit / best:.0%} | "
        f"{peak(asked.device) / 2**20:.0f} | {off:.0e} |"
    ).replace("nan", "—")
    print(row, flush=True)
    return row, off


def all_of(names: Sequence[str], precisions: Sequence[str], asked: Asked) -> tuple[list[str], list[str]]:
    """The rows, and what is wrong, a line each: one that fails leaves the others, for a GPU is not always at hand."""
    rows, wrong = list[str](), list[str]()
    for name, precision in product(names, precisions):
        try:
            row, off = measured(name, CASES[name](), precision, asked)
        except Exception as error:
            traceback.print_exc()
            wrong.append(f"{name} in {precision}: {type(error).__name__}: {error}")
            continue
        rows.append(row)
        if not off <= AGREE:
            wrong.append(f"{name} in {precision}: deltas differ by {off:.1e}, more than {AGREE:.0e}")
    return rows, wrong


def grid(asked: Asked) -> str:
    """The paper's Concrete grid, all of it; in words."""
    case = tabular("drop")
    settings = replace(case.settings, epochs=2 if asked.quick else 500)
    start = start_of(case.workload, settings, device=asked.device)
    cells, every = (5, 4) if asked.quick else (101, 100)
    removals: list[Removal] = [(9 * i,) for i in range(cells - 1)]
    size = measure_stacks(start, cells if asked.quick else 20 * cells, cells).replicas
    together = max(1, size // cells)

    def work() -> None:
        for _ in run_shards(start, [(removals, seed) for seed in range(every)], size):
            pass

    took = seconds(work, asked.device)
    return (
        f"The paper's Concrete grid, {cells} cells × {every} seeds × {settings.epochs} epochs, float32, evaluated "
        f"after every epoch, with second baselines: **{took:.1f} s** ({together} seeds and {size} replicas together)."
    )


def images() -> Case:
    """With epochs enough for steps to be recorded."""
    case = image()
    return replace(case, removals=31, settings=replace(case.settings, epochs=20))


CASES: dict[str, Callable[[], Case]] = {
    "concrete": lambda: replace(tabular("drop"), removals=100),
    "concrete-reweight": lambda: replace(tabular("reweight"), removals=100),
    "resnet9": images,
    "bert-small": lambda: text(
        "BERT, 4 layers of 512", 12, 2, 2, 16, hidden_size=512, num_hidden_layers=4, num_attention_heads=8,
        intermediate_size=2048,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--precision", nargs="*", choices=["float32", "float64"], default=["float32", "float64"])
    parser.add_argument("--full", action="store_true", help="the paper's Concrete grid besides")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--to", type=Path, help="a Markdown file to keep the table in, under a heading of its own")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here that torch can use: nothing was measured.")
        return
    asked = Asked(torch.device(given.device, 0) if given.device == "cuda" else torch.device(given.device), given.quick)
    with deterministic(asked.device):
        rows, wrong = all_of(given.only, given.precision, asked)
        whole = [grid(asked)] if given.full else []
    lines = [
        f"`make bench-gpu`, {time.strftime('%Y-%m-%d', time.gmtime())}. {device_name(asked.device)}, torch "
        f"{torch.__version__}, Python {platform.python_version()}. Milliseconds a step and cell, evaluation included.",
        "",
        "| | precision | cells × seeds × steps | stack | seeds | run | launched | limit | limit / best | MiB | apart |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *rows,
        *(["", *whole] if whole else []),
    ]
    told(HEADING, lines, given.to)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
