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

    name: Literal["sgd"] = Field(description="Stochastic gradient descent.")
    lr: Rate = Field(default=settings.LEARNING_RATE, description="Learning rate, the same at every step.")
    momentum: NonNegative = Field(default=0.0, description="As torch's.")
    dampening: float = Field(default=0.0, description="As torch's; 0 with nesterov.")
    nesterov: bool = Field(default=False, description="As torch's; needs momentum.")
    weight_decay: NonNegative = Field(default=settings.WEIGHT_DECAY["sgd"], description="As torch's.")


class _AdamLike(Section):
    lr: Rate = Field(default=settings.LEARNING_RATE, description="Learning rate, the same at every step.")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="As torch's.")
    eps: NonNegative = Field(default=1e-8, description="As torch's.")
    amsgrad: bool = Field(default=False, description="As torch's.")


class Adam(_AdamLike):
    """``torch.optim.Adam``."""

    name: Literal["adam"] = Field(description="Adam.")
    weight_decay: NonNegative = Field(
        default=settings.WEIGHT_DECAY["adam"], description="As torch's: added to the gradient."
    )


class AdamW(_AdamLike):
    """``torch.optim.AdamW``."""

    name: Literal["adamw"] = Field(description="Adam with decoupled weight decay.")
    weight_decay: NonNegative = Field(default=settings.WEIGHT_DECAY["adamw"], description="As torch's: decoupled.")


class Evaluate(Section):
    """When g is evaluated; exactly one of the forms; the last step always counts too."""

    every_epochs: Count | None = Field(default=None, description="At the end of every so many epochs.")
    every_steps: Count | None = Field(default=None, description="After every so many steps.")
    at_steps: tuple[Count, ...] | None = Field(default=None, description="After these numbers of steps.")

    @model_validator(mode="after")
    def _rules(self) -> Evaluate:
        _by_the_rules(lambda: settings.Evaluate(**self.model_dump()))
        return self


class Lora(Section):
    """Low-rank adapters on linear layers."""

    rank: Count = Field(description="Of an adapter: W x + (alpha / rank) B A x.")
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="The linear layers that get one, by the last parts of their dotted names."
    )
    alpha: Rate | None = Field(default=None, description="Without it the rank, so that the adapter counts as it is.")


class FurtherTraining(Section):
    """The section that defines the number. The removal mode is written out when the spec is resolved."""

    optimizer: Annotated[SGD | Adam | AdamW, Field(discriminator="name")] = Field(
        description="A fresh optimizer, `name: sgd`, `adam` or `adamw`, with torch's own semantics."
    )
    batch_size: Count = Field(description="Training examples in a batch; the ragged last batch of an epoch is kept.")
    epochs: Count | None = Field(default=None, description="How long; exactly one of `epochs` and `steps`.")
    steps: Count | None = Field(default=None, description="How long; exactly one of `epochs` and `steps`.")
    removal_mode: Literal["drop", "mask", "reweight"] | None = Field(
        default=None,
        description="How an example is left out. `reweight`: keep every batch and subtract its loss over n from every "
        "step's. `mask`: take it out of its own batch. `drop`: take it out of the data, so that later batches slide "
        "forward. Without it, `reweight`, or `mask` if the training forward mixes the examples of a batch, as batch "
        "norm does.",
    )
    evaluate: Evaluate = Field(
        default=Evaluate(every_epochs=1), description="When g is evaluated; exactly one form, and the last step always."
    )
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="The gradient's norm is clipped to this."
    )
    removal_weight: Rate = Field(
        default=1.0,
        description="w of `reweight`: w times the removal's loss over n is subtracted, and effects are divided by w. "
        "Above 1 it is a wider finite difference, which rounding blurs less.",
    )
    mode: Literal["train", "eval"] = Field(
        default="train", description="Of the model as it trains. `eval`: dropout and batch-norm statistics are frozen."
    )
    precision: Literal["float32", "float64"] = Field(
        default="float32", description="Of further training; g is taken in float64 from the model's outputs in either."
    )
    trainable: Literal["all"] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default="all",
        description="Patterns of the names of parameters that are trained, such as `classifier.*`. `all`: those that "
        "require a gradient, or with `lora` none but its adapters.",
    )
    lora: Lora | None = Field(
        default=None, description="Train low-rank adapters of linear layers (needs `fimo[lora]`)."
    )

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
