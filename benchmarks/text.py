"""Seconds of a cell of further training on text at BERT's size, over a plain loop's, measured side by side.

    python benchmarks/text.py [--steps 5] [--rounds 1] [--threads 2]

Setting: a classifier of BERT-base's shape (random weights, dropout 0.1), 67,349 training sentences whose lengths are
distributed as SST-2's (mean about 13 tokens, longest 66), AdamW at 1e-6, clipped at 1, batches of 64, the reweight
mode, g evaluated after every fifth step. Lengths are drawn from a clipped gamma distribution of that mean.

The plain loop is the paper's text script as one would write it: every batch padded to 128 tokens, the removed example
in a second pass, the whole validation set of 872 sentences evaluated, padded to 128 too. Ours is a shard's cell with
the engine as a sweep uses it: 100 evaluation examples, which is all that the sweep asks for. What both have in common
is the training itself: equally many batches of 64 and the same optimizer.

Both are timed from the first step on over the same number of steps, one evaluation for each fifth step, and the ratio
is that of the seconds per cell. The time that ``start_from`` takes is a sweep's, not a cell's, and printed apart.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
import transformers
from torch import Tensor, nn

from fimo.workers.device import deterministic
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.further_training import Training
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.start import start_from
from fimo.workers.workload import Workload

LONGEST, PADDED, SENTENCES, VALIDATION, ASKED = 66, 128, 67_349, 872, 100
ADAMW = {"lr": 1e-6, "weight_decay": 0.0}


def lengths(count: int, generator: torch.Generator) -> Tensor:
    """Tokens of a sentence, [CLS] and [SEP] included: gamma with SST-2's mean, at most its longest."""
    shape, mean = 1.4, 13.3
    drawn = torch._standard_gamma(torch.full((count,), shape), generator=generator) * (mean - 3) / shape
    return (3 + drawn).long().clamp(3, LONGEST)


def sentences(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    own = lengths(count, generator)
    own[count // 2] = LONGEST
    mask = torch.arange(LONGEST) < own[:, None]
    tokens = torch.randint(1000, 30_000, (count, LONGEST), generator=generator) * mask
    label = torch.randint(0, 2, (count,), generator=generator)
    return {"input_ids": tokens, "attention_mask": mask.long(), "label": label}


def bert() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=2))  # type: ignore[call-arg]


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits


def loss(out: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(out, batch["label"], reduction="none")


def padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    more = PADDED - LONGEST
    return {name: nn.functional.pad(t, (0, more)) if t.dim() == 2 else t for name, t in batch.items()}


def plain(model: nn.Module, train: dict[str, Tensor], evals: dict[str, Tensor], removed: int, steps: int) -> float:
    """Seconds of a cell as one would write it, one evaluation for each fifth step."""
    model, n = copy.deepcopy(model).train(), len(train["label"])
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    gone = padded({name: t[[removed]] for name, t in train.items()})
    begun = time.perf_counter()
    for step in range(1, steps + 1):
        batch = padded({name: t[order[(step - 1) * 64 : step * 64]] for name, t in train.items()})
        optimizer.zero_grad()
        total = loss(outputs(model, batch), batch).mean() - loss(outputs(model, gone), gone).sum() / n
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 5 == 0:
            model.eval()
            with torch.no_grad():
                for first in range(0, VALIDATION, 64):
                    some = padded({name: t[first : first + 64] for name, t in evals.items()})
                    loss(outputs(model, some).double(), some)
            model.train()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    train, evals = sentences(SENTENCES, 1), sentences(VALIDATION, 2)
    tokens = train["attention_mask"].sum(1).double()
    print(f"training sentences: mean {tokens.mean():.1f} tokens, longest {int(tokens.max())}", flush=True)
    model = bert()
    workload = Workload(model, train, {name: t[:ASKED] for name, t in evals.items()}, outputs, loss)
    settings = FurtherTraining(
        Optimizer("adamw", **ADAMW),
        batch_size=64,
        steps=given.steps,
        removal_mode="reweight",
        evaluate=Evaluate(every_steps=5),
        clip_norm=1.0,
    )
    with deterministic(torch.device("cpu")):
        begun = time.perf_counter()
        start = start_from(FunctionalModel(workload), Examples(workload.train), Examples(workload.evals), settings)
        ready = time.perf_counter() - begun
        print(f"start: {ready:.0f} s; trimmed {start.trimming is not None}, folded {start.folds}", flush=True)
        for number in range(given.rounds):
            theirs = plain(model, train, evals, 7 + number, given.steps)
            begun = time.perf_counter()
            training = Training(start, [(7 + number,)], 0)
            training.advance()
            ours = time.perf_counter() - begun
            assert training.result().deltas.isfinite().all()
            print(
                f"a cell of {given.steps} steps: plain {theirs:.1f} s, ours {ours:.1f} s: {theirs / ours:.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
