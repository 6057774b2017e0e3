"""What estimators cost beside a plain loop of backward passes over the examples that they have to differentiate.

    python benchmarks/gradients.py [--only encoder concrete ...] [--train 96] [--estimators grad_dot ...] [--budget 60]

The plain loop is what one would write: each example in a batch of its own, in eval mode, cut to its own length where it
is padded, `loss.backward()`. It is timed beside every estimator, before and after, so that a busy machine slows both.
Seconds are of the process's own time on a CPU, with one thread, and of the clock on a GPU.

    s         seconds
    passes    examples that have to be differentiated: R + E, and n more for each pass over the training examples
              (DataInf and TRAK one, EK-FAC two); only of the estimators of first order
    ratio     s over passes times the loop's seconds for an example
    eigen     seconds of them that eigendecompositions took, which do not grow with the examples
    counted   seconds that the estimator's counts foretell (`fimo.estimators.counts`, `rates`), and those over s

The encoder is a pretrained one of 22.7M parameters on real sentences (`make data`); a first estimate there pays for the
proof that its gradients may be taken layer by layer, which is printed apart.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fimo.estimators import Problem, parse
from fimo.estimators.differentiable import estimating
from fimo.estimators.operators.products import sides
from fimo.estimators.rates import Rates
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.workload import Workload

ROOT = Path(__file__).parents[1]
FIRST_ORDER: dict[str, Callable[[int, int, int], int]] = {
    "grad_dot": lambda n, r, e: r + e,
    "grad_cos": lambda n, r, e: r + e,
    "datainf": lambda n, r, e: n + e,
    "trak": lambda n, r, e: n + r + e,
    "ekfac": lambda n, r, e: 2 * n + r + e,
}
OTHERS = ("cg", "lissa", "lissa_h", "ekfac_matched", "lissa_matched")


def own(name: str, function: str) -> Workload:
    """A workload of examples/own."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "own" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: Workload = getattr(module, function)()
    return replace(made, padding="attention_mask") if name != "conv_net" else made


def encoder(train: int) -> Workload:
    """Real sentences of about 27 tokens, padded to 64, with a pretrained encoder."""
    sys.path.insert(0, str(ROOT))
    from fimo.workers.workloads.sst2 import sst2
    from tests.support import real_data

    with tempfile.TemporaryDirectory() as folder:
        data = real_data.write_sentences(Path(folder) / "movies", 2 * train, held_out=0.5)
        return sst2(data, initial=0, model=real_data.encoder(), max_length=64)


def last_layers(train: int) -> Workload:
    """The same, its last layer and head alone trained."""
    made = encoder(train)
    for name, parameter in made.model.named_parameters():
        parameter.requires_grad_("layer.5" in name or "classifier" in name)
    return made


def concrete() -> Workload:
    from fimo.workers.workloads.tabular import concrete as made

    return made()


MODELS: dict[str, Callable[[int], Workload]] = {
    "concrete": lambda _: concrete(),
    "conv_net": lambda _: own("conv_net", "images"),
    "text_classifier": lambda _: own("text_classifier", "sentences"),
    "causal_lm": lambda _: own("causal_lm", "text"),
    "encoder_last": last_layers,
    "encoder": encoder,
}


def clock() -> float:
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def plain_loop(workload: Workload, train: Examples, count: int = 12) -> float:
    """Seconds an example."""
    model = copy.deepcopy(workload.model).to(train.device).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    began = 0.0
    for index in (0, *range(count)):
        batch: Any = train.batch([index % len(train)])
        mask = batch.get(workload.padding) if isinstance(batch, dict) and workload.padding else None
        if mask is not None:
            length = int(mask.sum())
            batch = {k: v[:, :length] if v.dim() > 1 and v.shape[1] == mask.shape[1] else v for k, v in batch.items()}
        workload.loss(workload.outputs(model, batch), batch).sum().backward()
        for parameter in parameters:
            parameter.grad = None
        if began == 0.0:
            began = clock()
    return (clock() - began) / count


def measure(name: str, given: argparse.Namespace) -> None:
    """Print one model's table."""
    workload = MODELS[name](given.train)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = FunctionalModel(workload, device=device)
    train = Examples(workload.train, workload.collate, device).first(given.train)
    evals = Examples(workload.evals, workload.collate, device).first(16)
    removals = [(i * len(train) // 16,) for i in range(16)]
    settings = FurtherTraining(
        Optimizer(given.optimizer, 0.02 if given.optimizer == "sgd" else 1e-4),  # type: ignore[arg-type]
        32,
        steps=16,
        removal_mode="reweight",
        evaluate=Evaluate(at_steps=(4, 8, 16)),
        mode="eval",
    )
    problem = Problem(model, train, evals, removals, settings)
    size = sum(t.numel() for t in model.params.values())
    began = clock()
    with estimating(model):
        both = sides(model, train, evals, removals)
    proof, each = clock() - began, plain_loop(workload, train)
    print(f"\n{name}: {size:,} parameters, n = {len(train)}, R = 16, E = {len(evals)}; plain loop {1e3 * each:.2f} ms")
    if both is not None:
        way = both.train
        print(f"layer by layer (cut: {way.cuts is not None}, one at a time: {way.alone}); the proof took {proof:.2f} s")
    print(f"{'':16} {'s':>8} {'passes':>7} {'ratio':>6} {'eigen':>6} {'counted':>8} {'of s':>5}")
    rates = Rates(problem)
    for estimator in [e for n in given.estimators for e in parse(n)]:
        if (why := estimator.refuses(problem)) is not None:
            print(f"{estimator.name:16} {why[:90]}")
            continue
        counted = rates.seconds(estimator.work(problem))
        if counted > given.budget:
            print(f"{estimator.name:16} {'':30} {counted:8.2f}  over the budget")
            continue
        before, eigen = plain_loop(workload, train), [0.0]
        plain_eigh = torch.linalg.eigh

        def timed(*arguments: Any, plain: Any = plain_eigh, eigen: list[float] = eigen, **named: Any) -> Any:
            started = clock()
            found = plain(*arguments, **named)
            eigen[0] += clock() - started
            return found

        torch.linalg.eigh = timed
        began = clock()
        estimator.estimate(problem)
        spent = clock() - began
        torch.linalg.eigh = plain_eigh
        each = (before + plain_loop(workload, train)) / 2
        passes = FIRST_ORDER.get(estimator.name, lambda n, r, e: 0)(len(train), 16, len(evals))
        ratio = f"{(spent - eigen[0]) / passes / each:6.2f}" if passes else " " * 6
        print(
            f"{estimator.name:16} {spent:8.2f} {passes or '':>7} {ratio} {eigen[0]:6.2f} {counted:8.2f} "
            f"{counted / spent:5.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--estimators", nargs="+", default=[*FIRST_ORDER, *OTHERS])
    parser.add_argument("--train", type=int, default=200)
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    parser.add_argument("--budget", type=float, default=60.0, help="counted seconds beyond which none is run")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in given.only:
        measure(name, given)


if __name__ == "__main__":
    main()
