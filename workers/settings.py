"""Further-training settings as plain frozen values: the section of the spec that defines the number.

The one place for its rules and defaults: those of a spec, a notebook and a test are checked here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from fimo.workers.errors import UsageError, nearest

if TYPE_CHECKING:
    import torch

RemovalMode = Literal["drop", "mask", "reweight"]
OptimizerName = Literal["sgd", "adam", "adamw"]

LEARNING_RATE = 1e-3
WEIGHT_DECAY: dict[str, float] = {"sgd": 0.0, "adam": 0.0, "adamw": 1e-2}
"""torch's own defaults."""

EVAL_BATCH = 128
"""Evaluation examples in one block at least; a larger training batch makes it as large."""

_SGD_ALONE = {"momentum": 0.0, "dampening": 0.0, "nesterov": False}
_ADAM_ALONE = {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}


@dataclass(frozen=True)
class Optimizer:
    """SGD, Adam or AdamW with torch's own semantics and defaults.

    Attributes:
        weight_decay: None = torch's default: 0.01 for AdamW, 0 for the others.

    Raises:
        UsageError: an unknown name, an option of another optimizer, or a value out of range.
    """

    name: OptimizerName
    lr: float = LEARNING_RATE
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = None  # type: ignore[assignment]
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False

    def __post_init__(self) -> None:
        if self.name not in WEIGHT_DECAY:
            raise UsageError(f"optimizer '{self.name}' is not known{nearest(self.name, WEIGHT_DECAY)}")
        given: float | None = self.weight_decay
        if given is None:
            object.__setattr__(self, "weight_decay", WEIGHT_DECAY[self.name])
        for option, default in (_ADAM_ALONE if self.name == "sgd" else _SGD_ALONE).items():
            if getattr(self, option) != default:
                raise UsageError(f"optimizer {self.name} has no {option}")
        if not self.lr > 0:
            raise UsageError(f"optimizer {self.name}: lr must be above 0, got {self.lr}")
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise UsageError("nesterov needs momentum above 0 and dampening 0")

    def build(
        self,
        params: Sequence[Any],
        foreach: bool | None = None,
        fused: bool = False,
        capturable: bool = False,
    ) -> torch.optim.Optimizer:
        """torch's own optimizer over ``params``, tensors or groups of them.

        Args:
            capturable: Adam and AdamW count their steps on the GPU, so that a step can be recorded and launched again.
            fused: Adam and AdamW in one pass over memory. On a CPU torch reads the gradients as if they lay as their
                parameters do: they must.
        """
        import torch  # here alone, so that a spec is read without it

        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay, "foreach": foreach}
        if self.name == "sgd":
            return torch.optim.SGD(
                params, momentum=self.momentum, dampening=self.dampening, nesterov=self.nesterov, **options
            )
        kind = torch.optim.Adam if self.name == "adam" else torch.optim.AdamW
        if fused:
            options = {**options, "foreach": None, "fused": True}
        if capturable:
            options = {**options, "capturable": True}
        return kind(params, betas=self.betas, eps=self.eps, amsgrad=self.amsgrad, **options)


@dataclass(frozen=True)
class Evaluate:
    """When g is evaluated, by exactly one of the three; the last step always counts too (UsageError otherwise)."""

    every_epochs: int | None = None
    every_steps: int | None = None
    at_steps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if sum(v is not None for v in (self.every_epochs, self.every_steps, self.at_steps)) != 1:
            raise UsageError("give exactly one of every_epochs, every_steps, at_steps")
        if min((self.every_epochs or 1, self.every_steps or 1, *(self.at_steps or ()))) < 1 or 0 in (
            self.every_epochs,
            self.every_steps,
        ):
            raise UsageError("evaluate: steps and epochs are counted from 1")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021, LoRA, eq. 3) in place of the weights: W x + (alpha / rank) B A x, B = 0 at θᶠ.

    Attributes:
        targets: the linear layers that get one, by the last parts of their dotted names.
        alpha: None = the rank, so that the adapter counts as it is.

    Raises:
        UsageError: a rank below 1, or no target.
    """

    rank: int
    targets: tuple[str, ...]
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.targets:
            raise UsageError("lora needs a rank of at least 1 and targets: the names of linear layers")


@dataclass(frozen=True)
class Trains:
    """What further training changes; the rest of the model stays as it is.

    Attributes:
        parameters: patterns of parameter names (``classifier.*``), or all that require a gradient.
        lora: adapters; with them, of the model's own parameters only those that ``parameters`` names are trained.
    """

    parameters: tuple[str, ...] | Literal["all"] = "all"
    lora: Lora | None = None


ALL = Trains()


@dataclass(frozen=True)
class FurtherTraining:
    """How a cell is trained further; exactly one of ``epochs`` and ``steps`` is given.

    Attributes:
        removal_mode: None = reweight, or mask if the training forward mixes the examples of a batch
            (``fimo.workers.start`` decides, and writes it down).
        removal_weight: w of reweight mode: w Σ_{i∈removal} ℓ_i / n is subtracted from every step's loss, and a delta's
            difference from the baseline's is divided by w to make an effect. 1 = what a removal takes away; more is a
            wider finite difference of the same derivative, which rounding blurs less.
        trainable: patterns of the parameters that are trained, or all; ``lora``: adapters. See ``Trains``.

    Raises:
        UsageError: no length or two, a batch size or a length below 1, evaluation beyond the last step, a weight that
            is not above 0 and finite, or that drop or mask mode is given.
    """

    optimizer: Optimizer
    batch_size: int
    epochs: int | None = None
    steps: int | None = None
    removal_mode: RemovalMode | None = None
    evaluate: Evaluate = field(default_factory=lambda: Evaluate(every_epochs=1))
    clip_norm: float | None = None
    removal_weight: float = 1.0
    mode: Literal["train", "eval"] = "train"
    precision: Literal["float32", "float64"] = "float32"
    trainable: tuple[str, ...] | Literal["all"] = "all"
    lora: Lora | None = None

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise UsageError("give exactly one of epochs and steps")
        if min(self.batch_size, self.epochs or 1, self.steps or 1) < 1 or 0 in (self.epochs, self.steps):
            raise UsageError("batch_size, epochs and steps must be at least 1")
        if self.steps is not None and self.evaluate.at_steps and max(self.evaluate.at_steps) > self.steps:
            raise UsageError(f"evaluate.at_steps reaches beyond the {self.steps} steps of further training")
        if not 0 < self.removal_weight < math.inf:
            raise UsageError(f"removal_weight must be above 0 and finite, got {self.removal_weight}")
        if self.removal_weight != 1 and self.removal_mode in ("drop", "mask"):
            raise UsageError(
                f"removal_mode {self.removal_mode} takes an example out whole and has no removal_weight: leave it out, "
                "or use removal_mode: reweight"
            )

    @property
    def trains(self) -> Trains:
        """What is trained."""
        return Trains(self.trainable, self.lora)

    @property
    def eval_batch(self) -> int:
        """Evaluation examples in one block."""
        return max(EVAL_BATCH, self.batch_size)

    def settled(self, mixes: bool) -> FurtherTraining:
        """The same with the removal mode written out.

        Args:
            mixes: whether the training forward mixes the examples of a batch.

        Raises:
            UsageError: the mode is mask then, which has no removal weight.
        """
        if self.removal_mode is not None:
            return self
        if mixes and self.removal_weight != 1:
            raise UsageError(
                "removal_weight is for removal_mode reweight, and this model's is mask, since its training forward "
                "mixes the examples of a batch: leave removal_weight out, or use mode: eval for batch norm"
            )
        return replace(self, removal_mode="mask" if mixes else "reweight")
