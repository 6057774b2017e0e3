"""What the cells of a sweep share: the model at θᶠ, the data, g(z, θᶠ), and how the training forward behaves.

Invariant: a ``Start`` can be trained further. What cannot (a loss that is not one number an example, numbers that
are not finite at θᶠ) is refused here, once, before any cell is started.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fimo.workers.errors import DivergedError
from fimo.workers.examples import Batch, Examples
from fimo.workers.functional import FunctionalModel, check
from fimo.workers.settings import FurtherTraining
from fimo.workers.stacking.probe import Traits, traits
from fimo.workers.stacking.replay import Graphs
from torch import Tensor


@dataclass(frozen=True)
class Start:
    """All that a cell depends on but its removal and seed.

    Attributes:
        model: at θᶠ.
        train: 𝒟, on the model's device and in its dtype.
        evals: the evaluation examples as batches, in order.
        at_final: g(z, θᶠ), float64 (m,).
        settings: the further-training section.
        traits: how the training forward behaves.
        folds: examples are proven independent and nothing is drawn, so that a step is one block of all lanes, with
            weights: removed examples ride in the batch with weight −1/n, shorter batches are filled up with weight 0.
        graphs: traced steps of the stacks, filled as they train; None = nothing is traced.
    """

    model: FunctionalModel
    train: Examples
    evals: tuple[Batch, ...]
    at_final: Tensor
    settings: FurtherTraining
    traits: Traits
    folds: bool
    graphs: Graphs | None


def start_from(
    model: FunctionalModel,
    train: Examples,
    evals: Examples,
    settings: FurtherTraining,
    eval_batch: int | None = None,
    replay: bool = True,
) -> Start:
    """Prepare what the cells of a sweep share, and refuse what cannot be trained further.

    g(z, θᶠ) is computed here, in eval mode, in batches of ``eval_batch`` (default: a training batch, at least 128,
    so that evaluation needs no more memory than training).

    Args:
        replay: trace the steps of small models where that can be done; the numbers are the same to rounding.

    Raises:
        WorkloadError: a loss or measure that is not one number an example, or fails, or depends on no parameter.
        DivergedError: a loss or a measure at θᶠ is not finite.
    """
    size = min(len(train), settings.batch_size)
    check(model, train.batch(range(size)), size, ["loss"])
    blocks = tuple(batch for _, batch in evals.batches(eval_batch or max(128, settings.batch_size)))
    check(model, blocks[0], min(len(evals), eval_batch or max(128, settings.batch_size)), ["measure"])
    with torch.no_grad(), model.mode("eval"):
        at_final = torch.cat([model.measure(model.params, b) for b in blocks]).cpu()
        # A dataset may be long to read, so that of its examples only the first batch is looked at.
        looked_at = train.batches(1024, range(len(train) if train.tensors is not None else size))
        losses = torch.cat([model.loss(model.params, b) for _, b in looked_at])
    _refuse_not_finite(losses, "loss of training example")
    _refuse_not_finite(at_final, "measure of evaluation example")
    found = traits(model, train, size, settings.mode)
    folds = train.tensors is not None and found.independent
    # Batches of a dataset may differ in shape from step to step, and each shape would be traced.
    pure = not (found.random or found.mutable) and train.tensors is not None
    return Start(model, train, blocks, at_final, settings, found, folds, {} if replay and pure else None)


def _refuse_not_finite(values: Tensor, what: str) -> None:
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        more = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
        value = float(values[bad[0]])
        raise DivergedError(f"the {what} {bad[0]}{more} is {value} at the final model: mend the example or the model")
