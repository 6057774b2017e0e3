"""What the estimators cost on Concrete (removals 0, 9, …, 891; 103 evaluation examples), as ratios measured in one
run.

Prints JSON: seconds of each default estimator and of all together; how much faster conjugate gradients are for 100
evaluation examples in one block than one at a time (the latter timed on a few and scaled up), compressed and
matrix-free; and gradients computed by Grad-Dot and DataInf against the examples that they need.

    python benchmarks/estimator_costs.py
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fimo.estimators import Estimator, Problem, defaults, parse
from fimo.estimators.operators import gradients
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.settings import FurtherTraining, Optimizer
from fimo.workers.workloads.tabular import concrete


def problem(evals: slice = slice(None)) -> Problem:
    workload = concrete()
    settings = FurtherTraining(Optimizer("sgd", 0.03), 128, epochs=500)
    return Problem(
        FunctionalModel(workload),
        Examples(workload.train),
        Examples({name: tensor[evals] for name, tensor in dict(workload.evals).items()}),  # type: ignore[arg-type]
        [[i] for i in range(0, 900, 9)],
        further_training=settings,
        seeds=(0,),
    )


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def costs() -> dict[str, float]:
    """Seconds of each default estimator."""
    whole = problem()
    return {e.name: round(seconds(lambda e=e: e.estimate(whole)), 2) for e in defaults(whole)}  # type: ignore[misc]


def block_speedup(estimator: Estimator, alone: int) -> dict[str, float]:
    """100 evaluation examples in one block against one at a time, ``alone`` of which are timed."""
    block = seconds(lambda: estimator.estimate(problem(slice(0, 100))))
    each = [seconds(lambda i=i: estimator.estimate(problem(slice(i, i + 1)))) for i in range(alone)]  # type: ignore[misc]
    one_at_a_time = 100 * sum(each) / alone
    return {
        "block_s": round(block, 2),
        "one_at_a_time_s": round(one_at_a_time, 1),
        "ratio": round(one_at_a_time / block, 1),
    }


def gradients_computed(name: str) -> dict[str, int]:
    """Per-example gradients that an estimator computes, and how many distinct ones there are to compute."""
    counted = 0
    plain = gradients.per_example

    def counting(*arguments: Any) -> Tensor:
        nonlocal counted
        rows = plain(*arguments)
        counted += len(rows)
        return rows

    whole = problem()
    gradients.per_example = counting  # type: ignore[assignment]
    try:
        parse(name)[0].estimate(whole)
    finally:
        gradients.per_example = plain
    training = len(whole.train) if name == "datainf" else len(whole.removals)
    return {"computed": counted, "distinct": training + len(whole.evals)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alone", type=int, default=3, help="evaluation examples that are timed one at a time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skip-defaults", action="store_true", help="leave out the seconds of the default set")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {"threads": options.threads}
    if not options.skip_defaults:
        report["default_estimators_s"] = costs()
        report["default_set_s"] = round(sum(report["default_estimators_s"].values()), 1)
    report["cg_block_against_one_at_a_time"] = block_speedup(parse("cg")[0], options.alone)
    report["gradients"] = {name: gradients_computed(name) for name in ("grad_dot", "grad_cos", "datainf")}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
