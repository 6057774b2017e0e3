"""What the cells of a sweep share: the model at θᶠ, the data, g(z, θᶠ), and how the training forward behaves.

Invariant: a ``Start`` can be trained further. A loss that is not one number an example, numbers that are not finite at
θᶠ, a removal mode that means something else for this model: refused here, once, before any cell is started.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fimo.workers.contract import check, not_finite_keys
from fimo.workers.device import is_gpu
from fimo.workers.errors import DivergedError, UsageError, WorkloadError
from fimo.workers.examples import Examples
from fimo.workers.forward import Forward, close, largest, moved, observe, refuse_mixing
from fimo.workers.functional import FunctionalModel, PerExample
from fimo.workers.randomness import kept, seed_all, states
from fimo.workers.settings import FurtherTraining
from fimo.workers.stacking import probe
from fimo.workers.stacking.captured import Recorder, recorder_of
from fimo.workers.stacking.evaluation import Evals, in_blocks
from fimo.workers.stacking.masks import Calls, StepMasks
from fimo.workers.stacking.products import multiplied
from fimo.workers.stacking.replay import AFTER, Graphs
from fimo.workers.stacking.trimming import Trimming, trimming

LOOK_S = 10.0
"""Seconds that may be spent on looking for training examples whose loss is not finite."""


@dataclass(frozen=True)
class Engine:
    """What may be done to be fast; with nothing of it, cells are trained one at a time as the definition has it.

    Attributes:
        replay: trace the steps of small models, and multiply by oneDNN where that is faster.
        trim: cut batches to their longest example, and into parts of similar length.
        fold: make one block of a step's blocks, if examples are proven independent.
        stack: train replicas together.
        fork: start a cell where it first differs from the baseline.
        join: train replicas of several seeds together.
        abreast: compute the replicas of a stack each by itself, on several streams of a GPU, where that was measured to
            be faster (``fimo.workers.stacking.abreast``).
    """

    replay: bool = True
    trim: bool = True
    fold: bool = True
    stack: bool = True
    fork: bool = True
    join: bool = True
    abreast: bool = False


@dataclass(frozen=True)
class Subtracted:
    """What is subtracted from every step's loss: Σ over a replica's examples of their values, · w / n.

    The sweep's cells subtract the losses of removed training examples in reweight mode. ``fimo.workers.mirror``
    subtracts measures of evaluation examples.

    Attributes:
        examples: those that a replica's numbers are places among.
        value: of each; ``mode``: of the model in that forward.
        trimming: how they are cut; None = they are not.
    """

    examples: Examples
    value: PerExample
    mode: Literal["train", "eval"]
    trimming: Trimming | None = None


@dataclass(frozen=True)
class Start:
    """All that a cell depends on but its removal and seed.

    Attributes:
        model: at θᶠ.
        train: 𝒟, on the model's device and in its dtype.
        examples: the evaluation examples; ``evals``: as batches.
        at_final: g(z, θᶠ), float64 (m,).
        settings: the further-training section, its removal mode settled.
        forward: how the training forward behaves.
        engine: what may be done to be fast.
        folds: a step is one block of all lanes, with weights (``fimo.workers.stacking.folding``).
        graphs: traced steps of the stacks, filled as they train; None = nothing is traced.
        captures: how a step's kernels are recorded, on a device that launches them; None = they are not.
        trimming: how training examples are cut; None = they are not.
        calls: the forward's calls of dropout, if a folded step gets its masks from them; ``tokens``: of an example that
            is not cut.
        subtracted: what replicas subtract instead of the losses of what they remove; they then remove nothing.
        reads: what is read of ``evals`` instead of g, float64.
    """

    model: FunctionalModel
    train: Examples
    examples: Examples
    evals: Evals
    at_final: Tensor
    settings: FurtherTraining
    forward: Forward
    engine: Engine
    folds: bool
    graphs: Graphs | None
    trimming: Trimming | None = None
    calls: Calls = ()
    tokens: int = 0
    subtracted: Subtracted | None = None
    reads: PerExample | None = None
    captures: Recorder | None = None

    @property
    def warms(self) -> bool:
        """Whether the first steps of a signature are slower than those that are replayed."""
        return self.graphs is not None or self.captures is not None

    @property
    def first_steps(self) -> int:
        """A pass's first steps, which are not as those of a long run are."""
        return AFTER + 2 if self.warms else 1

    @property
    def joins(self) -> bool:
        """Whether replicas of several seeds may be trained together: nothing is drawn, or computed once for a batch."""
        asked = self.engine.stack and self.engine.join
        return asked and not (self.forward.random or self.model.partial)

    @property
    def abreast(self) -> bool:
        """Whether the replicas of a stack are computed each by itself: nothing is drawn, which all would share."""
        return self.engine.stack and self.engine.abreast and not self.forward.random

    @property
    def by_vmap(self) -> Start:
        """The same, but not abreast: replicas abreast have the bits of one that is alone, by ``vmap`` others."""
        return self.using(replace(self.engine, abreast=False)) if self.abreast else self

    def using(self, engine: Engine) -> Start:
        """The same with no more than ``engine`` allows."""
        folds = self.folds and engine.fold
        start = replace(
            self,
            engine=engine,
            folds=folds,
            graphs=self.graphs if engine.replay else None,
            captures=self.captures if engine.replay else None,
            trimming=self.trimming if engine.trim and folds else None,
        )
        cut = self.evals.places is not None and not engine.trim
        if not cut and engine.replay == self.engine.replay:
            return start
        # g at θᶠ by the kernels that will evaluate it.
        evals = in_blocks(self.examples, self.settings.eval_batch) if cut else self.evals
        return replace(start, evals=evals, at_final=_at_final(self.model, evals, engine))

    def masks(self, seeds: tuple[int, int]) -> StepMasks | None:
        """The dropout masks of a step whose forwards have these seeds; None = each forward draws its own."""
        return StepMasks(self.model, self.calls, seeds, self.tokens) if self.folds and self.calls else None


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
    if model.trains != settings.trains:
        raise UsageError("the model trains other parameters than the settings say: give it settings.trains")
    engine = engine or Engine()
    size, some = min(len(train), settings.batch_size), min(len(evals), settings.eval_batch)
    check(model, train.batch(range(size)), size, ["loss"])
    check(model, evals.batch(range(some)), some, ["measure"])
    blocks, at_final = _evaluated(model, evals, settings, engine)
    cuts = probe.proven_cuts(model, train) if engine.trim else None
    _refuse_not_finite(_losses(model, train, size, cuts), "loss of training example", train)
    _refuse_not_finite(at_final, "measure of evaluation example", evals)
    looked_at = probe.shortest(train, cuts, settings)
    forward = observe(model, looked_at, settings)
    settings = settings.settled(forward.mixes)
    refuse_mixing(forward, settings)
    calls = probe.dropout_calls(model, train, forward, settings)
    folds = (
        engine.fold
        and train.tensors is not None
        and calls is not None
        and probe.independent(model, looked_at, forward, settings, len(train))
        and probe.same_in_parts(model, train, calls, settings, cuts)
    )
    # Batches of a dataset, and those that are cut, differ in shape from step to step, and each would be traced.
    repeats = engine.replay and train.tensors is not None and cuts is None and not forward.random
    captures = recorder_of(model.device) if repeats else None
    tokens = probe.tokens(train, model.padding)
    return Start(
        model,
        train,
        evals,
        blocks,
        at_final,
        settings,
        forward,
        engine,
        folds,
        Graphs() if repeats and not forward.mutable and not is_gpu(model.device) else None,
        cuts if folds else None,
        calls or (),
        tokens,
        captures=captures,
    )


def _evaluated(
    model: FunctionalModel, evals: Examples, settings: FurtherTraining, engine: Engine
) -> tuple[Evals, Tensor]:
    """The evaluation examples as batches, cut if that changes nothing at θᶠ, and g(z, θᶠ)."""
    plain = in_blocks(evals, settings.eval_batch)
    at_final = _at_final(model, plain, engine)
    cuts = trimming(evals, model.padding) if engine.trim else None
    if cuts is None:
        return plain, at_final
    try:
        cut = in_blocks(evals, settings.eval_batch, cuts)
        again, tolerance = _at_final(model, cut, engine), 1e-9 if model.dtype is torch.float64 else 1e-4
        away = _same_away(model, evals, cut, cuts, tolerance)
    except Exception:
        # Whatever the model objects to, nothing is cut.
        return plain, at_final
    same = close(again, at_final, tolerance, largest(at_final))
    return (cut, again) if same and away else (plain, at_final)


@torch.no_grad()
def _same_away(model: FunctionalModel, evals: Examples, cut: Evals, cuts: Trimming, tolerance: float) -> bool:
    """Whether the shortest examples have the same g cut and whole away from θᶠ, where gates are open."""
    chosen = torch.argsort(cuts.lengths, stable=True)[: len(pytree.tree_leaves(cut.blocks[0])[0])]
    away = moved(model.params, 3)
    with model.mode("eval"), kept(model.device):
        whole, short = (model.measure(away, batch) for batch in (evals.batch(chosen), cut.blocks[0]))
    return close(short, whole, tolerance, largest(whole))


@torch.no_grad()
def _losses(model: FunctionalModel, train: Examples, size: int, cuts: Trimming | None) -> Tensor:
    """Losses in eval mode of the first training examples: as many as can be had in ``LOOK_S`` seconds.

    A dataset may be long to read, so that of its examples only the first batch is looked at.
    """
    begun, losses = time.monotonic(), []
    with model.mode("eval"):
        looked_at = range(len(train) if train.tensors is not None else size)
        for places, batch in train.batches(1024 if cuts is None else 64, looked_at):
            cut = batch if cuts is None else cuts.cut(batch, cuts.longest(torch.tensor(places)))
            losses.append(model.loss(model.params, cut))
            if time.monotonic() - begun > LOOK_S:
                break
    return torch.cat(losses)


def _at_final(model: FunctionalModel, evals: Evals, engine: Engine) -> Tensor:
    """g(z, θᶠ), float64 (m,); refused if it is another number the next time (WorkloadError).

    No seed reaches an evaluation, so that its random numbers would pass for effects.
    """

    def measured(seed: int, count: int | None = None) -> Tensor:
        seed_all(seed, model.device)
        return torch.cat([model.measure(model.params, b) for b in evals.blocks[:count]]).double().cpu()

    with torch.no_grad(), model.mode("eval"), kept(model.device), multiplied(model, engine.replay):
        seed_all(0, model.device)
        before = states(model.device)
        at_final = measured(0)
        drew = states(model.device) != before
        # A forward that drew may have drawn in the last block alone.
        again = measured(1, None if drew else 1)
    if not torch.equal(at_final[: len(again)].nan_to_num(), again.nan_to_num()):
        raise WorkloadError(
            "the measure gives other numbers for the same parameters and examples: in eval mode the forward draws "
            "random numbers (functional dropout needs training=self.training), counts its calls, or writes to its "
            "buffers or to its batch"
        )
    return evals.in_order(at_final)


def _refuse_not_finite(values: Tensor, what: str, examples: Examples) -> None:
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        more = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
        holds = not_finite_keys(examples.batch([bad[0]]))
        why = f": its {holds[0]} holds a number that is not finite" if holds else ""
        value = float(values[bad[0]])
        raise DivergedError(
            f"the {what} {bad[0]}{more} is {value} at the final model{why}; mend the example or the model"
        )
