"""The further-training section of a spec: the types of its keys; ``fimo.workers.settings`` has the rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fimo.orchestrator.spec.section import Count, Section
from fimo.workers import settings
from fimo.workers.errors import UsageError

Rate = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _by_the_rules(make: Callable[[], object]) -> None:
    try:
        make()
    except UsageError as error:
        raise ValueError(str(error)) from error


class SGD(Section):
    """``torch.optim.SGD``."""

    name: Literal["sgd"]
    lr: Rate = settings.LEARNING_RATE
    momentum: NonNegative = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: NonNegative = settings.WEIGHT_DECAY["sgd"]


class _AdamLike(Section):
    lr: Rate = settings.LEARNING_RATE
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: NonNegative = 1e-8
    amsgrad: bool = False


class Adam(_AdamLike):
    """``torch.optim.Adam``."""

    name: Literal["adam"]
    weight_decay: NonNegative = settings.WEIGHT_DECAY["adam"]


class AdamW(_AdamLike):
    """``torch.optim.AdamW``."""

    name: Literal["adamw"]
    weight_decay: NonNegative = settings.WEIGHT_DECAY["adamw"]


class Evaluate(Section):
    """When g is evaluated; exactly one of the forms; the last step always counts too."""

    every_epochs: Count | None = None
    every_steps: Count | None = None
    at_steps: tuple[Count, ...] | None = None

    @model_validator(mode="after")
    def _rules(self) -> Evaluate:
        _by_the_rules(lambda: settings.Evaluate(**self.model_dump()))
        return self


class Lora(Section):
    """Low-rank adapters on linear layers."""

    rank: Count
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    alpha: Rate | None = None


class FurtherTraining(Section):
    """The section that defines the number.

    Attributes:
        removal_mode: None = reweight, or mask if the model's training forward mixes the examples of a batch; written
            out when the spec is resolved.
        removal_weight: w, in reweight alone: w Σ_{i∈removal} ℓ_i / n is subtracted from every step's loss, and effects
            are divided by w.
        trainable: patterns of the parameters that are trained; all, or with ``lora`` none, but its adapters.
    """

    optimizer: Annotated[SGD | Adam | AdamW, Field(discriminator="name")]
    batch_size: Count
    epochs: Count | None = None
    steps: Count | None = None
    removal_mode: Literal["drop", "mask", "reweight"] | None = None
    evaluate: Evaluate = Evaluate(every_epochs=1)
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    removal_weight: Rate = 1.0
    mode: Literal["train", "eval"] = "train"
    precision: Literal["float32", "float64"] = "float32"
    trainable: Literal["all"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all"
    lora: Lora | None = None

    @model_validator(mode="after")
    def _rules(self) -> FurtherTraining:
        _by_the_rules(self.settings)
        return self

    def settings(self) -> settings.FurtherTraining:
        """The same as the plain values that ``workers`` takes."""
        plain = self.model_dump(exclude={"optimizer", "evaluate", "lora"})
        return settings.FurtherTraining(
            optimizer=settings.Optimizer(**self.optimizer.model_dump()),
            evaluate=settings.Evaluate(**self.evaluate.model_dump()),
            lora=None if self.lora is None else settings.Lora(**self.lora.model_dump()),
            **plain,
        )
