"""How a shipped workload's final model θᶠ is trained: a plain loop, from torch's default initialisation under a seed.

One recipe for all: ``torch.manual_seed(seed)`` before the model is made, batches in the order of a ``RandomSampler``
seeded by the same number (the paper's own order, github.com/IBM/fimoda), the mean loss of a batch, a torch optimizer.
Each workload's module has its settings in ``RECIPE`` and can be run:

    python -m fimo.workers.workloads.energy ENB2012_data.xlsx --to energy.safetensors --seed 0

Not further training: what a number is, is ``fimo.workers.definition``. A final model may come from anywhere.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from fimo.workers.errors import FimoError, UsageError
from fimo.workers.examples import Batch, Examples
from fimo.workers.randomness import kept, seed_all, step_seed
from fimo.workers.settings import Optimizer
from fimo.workers.stacking.trimming import trimming
from fimo.workers.workload import Workload


@dataclass(frozen=True)
class Recipe:
    """Settings of the loop.

    Attributes:
        peak: None = a constant learning rate; else it rises linearly from 0 to ``optimizer.lr`` over this share of the
            steps, and falls linearly to 0.
        clip_norm: clips the norm of a batch's gradient; None = it is not.
    """

    optimizer: Optimizer
    epochs: int
    batch_size: int = 128
    peak: float | None = None
    clip_norm: float | None = None

    def rate(self, step: int, steps: int) -> float:
        """The learning rate at ``step`` of 0 … ``steps`` − 1, as a share of the optimizer's."""
        if self.peak is None:
            return 1.0
        place = (step + 1) / steps
        return place / self.peak if place < self.peak else (1 - place) / (1 - self.peak) + 1 / steps


def network(make: Callable[[], nn.Module], initial: int | None) -> nn.Module:
    """A model with torch's default initialisation under seed ``initial``; None = an architecture without numbers.

    The latter lies on torch's meta device, and is refused as a start unless it is given a final model.
    """
    if initial is None:
        with torch.device("meta"):
            return make()
    with kept(torch.device("cpu")):
        torch.manual_seed(initial)
        return make()


def train(
    workload: Workload,
    recipe: Recipe,
    seed: int,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Train ``workload.model`` in place, from the numbers that it has, and leave it on the CPU in eval mode.

    Batches of text are cut to their longest example, as ``Workload.padding`` says where that ends.

    Args:
        seed: of the batches' order and of what the forward draws.
        say: hears ten lines of progress.
    """
    device = torch.device(device)
    model, examples = workload.model.to(device).train(), Examples(workload.train, workload.collate, device)
    sampler = RandomSampler(range(len(examples)), generator=torch.Generator().manual_seed(seed))
    params, cuts = [p for p in model.parameters() if p.requires_grad], trimming(examples, workload.padding)
    optimizer = recipe.optimizer.build(params)
    steps, step = recipe.epochs * -(-len(examples) // recipe.batch_size), 0
    with kept(device):
        for epoch in range(1, recipe.epochs + 1):
            order, total, seen = torch.tensor(list(sampler)), torch.zeros((), device=device), 0
            for rows in order.split(recipe.batch_size):
                for group in optimizer.param_groups:
                    group["lr"] = recipe.optimizer.lr * recipe.rate(step, steps)
                step += 1
                seed_all(step_seed(seed, step, "batch"), device)
                batch = examples.batch(rows)
                losses = _losses(workload, batch if cuts is None else cuts.cut(batch, cuts.longest(rows)))
                optimizer.zero_grad()
                losses.mean().backward()
                if recipe.clip_norm is not None:
                    nn.utils.clip_grad_norm_(params, recipe.clip_norm)
                optimizer.step()
                total, seen = total + losses.detach().sum(), seen + len(rows)
                if step % max(1, steps // 10) == 0 or step == steps:
                    mean = float(total) / seen
                    say(f"epoch {epoch}/{recipe.epochs}, step {step}/{steps}: mean loss {mean:.4g} in this epoch")
    model.to("cpu").eval()


def _losses(workload: Workload, batch: Batch) -> Tensor:
    losses: Tensor = workload.loss(workload.outputs(workload.model, batch), batch)
    return losses


@torch.no_grad()
def quality(workload: Workload) -> dict[str, float]:
    """Mean loss in eval mode on the training and on the evaluation examples; accuracy if the outputs are logits."""
    found: dict[str, float] = {}
    workload.model.eval()
    for name, source in (("train", workload.train), ("evals", workload.evals)):
        losses, right, examples = [], [], Examples(source, workload.collate)
        cuts = trimming(examples, workload.padding)
        # Of text in order of length, so that little of what is computed is padding.
        order = None if cuts is None else torch.argsort(cuts.lengths, stable=True).tolist()
        for rows, whole in examples.batches(256 if cuts is None else 64, order):
            batch = whole if cuts is None else cuts.cut(whole, cuts.longest(torch.tensor(rows)))
            outputs = workload.outputs(workload.model, batch)
            losses.append(workload.loss(outputs, batch))
            labels = batch.get("y", batch.get("label")) if isinstance(batch, dict) else None
            if outputs.dim() == 2 and isinstance(labels, Tensor) and not labels.is_floating_point():
                right.append(outputs.argmax(dim=1) == labels)
        found[f"{name} loss"] = float(torch.cat(losses).mean())
        if right:
            found[f"{name} accuracy"] = float(torch.cat(right).double().mean())
    return found


def save(model: nn.Module, path: Path) -> None:
    """The state dict as safetensors; a tied parameter is written once.

    Raises:
        UsageError: the file cannot be written.
    """
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach().cpu().contiguous()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error


def main(make: Callable[..., Workload], recipe: Recipe, needs_data: bool = True) -> None:
    """The command line of a workload's module: train its final model and save it. Exits 1 or 2 with one line if not.

    Args:
        make: the workload's function; called with ``initial`` and, if it ``needs_data``, with the data's path.
    """
    command = argparse.ArgumentParser(description=f"Train a final model for {make.__name__} by its recipe.")
    if needs_data:
        command.add_argument("data", type=Path, help="the data, as the module's docstring has it")
    command.add_argument("--to", type=Path, required=True, metavar="FILE.safetensors")
    command.add_argument("--seed", type=int, default=0, help="of the initialisation and of the order (default 0)")
    command.add_argument("--epochs", type=int, default=recipe.epochs, help=f"(default {recipe.epochs})")
    command.add_argument("--lr", type=float, default=recipe.optimizer.lr, help=f"(default {recipe.optimizer.lr})")
    command.add_argument("--batch-size", type=int, default=recipe.batch_size, help=f"(default {recipe.batch_size})")
    if "model" in inspect.signature(make).parameters:
        command.add_argument("--model", help="the model's folder, or its name on the hub")
    command.add_argument("--arguments", type=json.loads, default={}, metavar="JSON", help="as workload_args in a spec")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = command.parse_args()
    given: dict[str, Any] = {**asked.arguments, "initial": asked.seed}
    if getattr(asked, "model", None) is not None:
        given["model"] = Path(asked.model)
    optimizer = replace(recipe.optimizer, lr=asked.lr)
    recipe = replace(recipe, optimizer=optimizer, epochs=asked.epochs, batch_size=asked.batch_size)
    try:
        workload = make(asked.data, **given) if needs_data else make(**given)
        train(workload, recipe, asked.seed, asked.device, _to_stderr)
        save(workload.model, asked.to)
    except FimoError as error:
        sys.exit(_failed(error))
    print(", ".join(f"{name} {value:.4g}" for name, value in quality(workload).items()))


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _failed(error: FimoError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code
