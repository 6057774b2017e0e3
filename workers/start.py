"""What the cells of a sweep share: the model at θᶠ, the data, g(z, θᶠ), and how the training forward behaves.

Invariant: a ``Start`` can be trained further. A loss that is not one number an example, numbers that are not finite at
θᶠ, a removal mode that means something else for this model: refused here, once, before any cell is started.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fimo.workers.errors import DivergedError, WorkloadError
from fimo.workers.examples import Batch, Examples
from fimo.workers.forward import Forward, observe, refuse_mixing
from fimo.workers.functional import FunctionalModel, check
from fimo.workers.randomness import kept, python_state, seed_all, torch_state
from fimo.workers.settings import FurtherTraining
from fimo.workers.stacking.probe import independent
from fimo.workers.stacking.replay import Graphs


@dataclass(frozen=True)
class Engine:
    """What may be done to be fast; with nothing of it, cells are trained one at a time as the definition has it.

    Attributes:
        replay: trace the steps of small models.
        fold: make one block of a step's blocks, if examples are proven independent.
        stack: train replicas together.
    """

    replay: bool = True
    fold: bool = True
    stack: bool = True


@dataclass(frozen=True)
class Start:
    """All that a cell depends on but its removal and seed.

    Attributes:
        model: at θᶠ.
        train: 𝒟, on the model's device and in its dtype.
        evals: the evaluation examples as batches, in order.
        at_final: g(z, θᶠ), float64 (m,).
        settings: the further-training section, its removal mode settled.
        forward: how the training forward behaves.
        engine: what may be done to be fast.
        folds: a step is one block of all lanes, with weights (``fimo.workers.stacking.folding``).
        graphs: traced steps of the stacks, filled as they train; None = nothing is traced.
    """

    model: FunctionalModel
    train: Examples
    evals: tuple[Batch, ...]
    at_final: Tensor
    settings: FurtherTraining
    forward: Forward
    engine: Engine
    folds: bool
    graphs: Graphs | None

    def using(self, engine: Engine) -> Start:
        """The same with no more than ``engine`` allows."""
        graphs = self.graphs if engine.replay else None
        return replace(self, engine=engine, folds=self.folds and engine.fold, graphs=graphs)


def start_from(
    model: FunctionalModel, train: Examples, evals: Examples, settings: FurtherTraining, engine: Engine | None = None
) -> Start:
    """Prepare what the cells of a sweep share, and refuse what cannot be trained further.

    g(z, θᶠ) is computed here, in eval mode, in blocks of ``settings.eval_batch``.

    Args:
        engine: default: everything; the numbers are the same to rounding.

    Raises:
        WorkloadError: a loss or measure that is not one number an example, or fails, or depends on no parameter, or
            draws random numbers that no seed reaches.
        DivergedError: a loss or a measure at θᶠ is not finite.
        UsageError: a removal mode that this model's training forward does not have.
    """
    engine = engine or Engine()
    size, block = min(len(train), settings.batch_size), settings.eval_batch
    check(model, train.batch(range(size)), size, ["loss"])
    blocks = tuple(batch for _, batch in evals.batches(block))
    check(model, blocks[0], min(len(evals), block), ["measure"])
    at_final = _at_final(model, blocks)
    with torch.no_grad(), model.mode("eval"):
        # A dataset may be long to read, so that of its examples only the first batch is looked at.
        looked_at = train.batches(1024, range(len(train) if train.tensors is not None else size))
        losses = torch.cat([model.loss(model.params, b) for _, b in looked_at])
    _refuse_not_finite(losses, "loss of training example")
    _refuse_not_finite(at_final, "measure of evaluation example")
    forward = observe(model, train, settings)
    settings = settings.settled(forward.mixes)
    refuse_mixing(forward, settings)
    folds = engine.fold and train.tensors is not None and independent(model, train, forward, settings)
    # Batches of a dataset may differ in shape from step to step, and each shape would be traced.
    traces = engine.replay and train.tensors is not None and not (forward.random or forward.mutable)
    graphs: Graphs | None = {} if traces else None
    return Start(model, train, blocks, at_final, settings, forward, engine, folds, graphs)


def _at_final(model: FunctionalModel, blocks: tuple[Batch, ...]) -> Tensor:
    """g(z, θᶠ), float64 (m,); refused if it is another number the next time (WorkloadError).

    No seed reaches an evaluation, so that its random numbers would pass for effects.
    """

    def measured(seed: int, blocks: tuple[Batch, ...]) -> Tensor:
        seed_all(seed, model.device)
        return torch.cat([model.measure(model.params, b) for b in blocks]).double().cpu()

    with torch.no_grad(), model.mode("eval"), kept(model.device):
        seed_all(0, model.device)
        before = torch_state(model.device), python_state()
        at_final = measured(0, blocks)
        drew = not torch.equal(torch_state(model.device), before[0]) or python_state() != before[1]
        # A forward that drew may have drawn in the last block alone.
        again = measured(1, blocks if drew else blocks[:1])
    if not torch.equal(at_final[: len(again)].nan_to_num(), again.nan_to_num()):
        raise WorkloadError(
            "the measure gives other numbers for the same parameters and examples: in eval mode the forward draws "
            "random numbers (functional dropout needs training=self.training), counts its calls, or writes to its "
            "buffers or to its batch"
        )
    return at_final


def _refuse_not_finite(values: Tensor, what: str) -> None:
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        more = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
        value = float(values[bad[0]])
        raise DivergedError(f"the {what} {bad[0]}{more} is {value} at the final model: mend the example or the model")
