"""Further-training settings as plain frozen values: the section of the spec that defines the number."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

RemovalMode = Literal["drop", "mask", "reweight"]


@dataclass(frozen=True)
class Optimizer:
    """An optimizer with torch's own semantics and defaults (SGD, Adam or AdamW)."""

    name: Literal["sgd", "adam", "adamw"]
    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False


@dataclass(frozen=True)
class Evaluate:
    """When g is evaluated: exactly one of the three is set; the last step always counts too."""

    every_epochs: int | None = None
    every_steps: int | None = None
    at_steps: tuple[int, ...] | None = None


@dataclass(frozen=True)
class FurtherTraining:
    """DESIGN.md section 5. Exactly one of ``epochs`` and ``steps`` is set."""

    optimizer: Optimizer
    batch_size: int
    epochs: int | None = None
    steps: int | None = None
    removal_mode: RemovalMode = "reweight"
    evaluate: Evaluate = field(default_factory=lambda: Evaluate(every_epochs=1))
    clip_norm: float | None = None
    mode: Literal["train", "eval"] = "train"
    precision: Literal["float32", "float64"] = "float32"
