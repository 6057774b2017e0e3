"""The declarations that several estimators share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fimo.estimators.declared.base import Declaration


@dataclass(frozen=True)
class Damped(Declaration):
    """Of the estimators with a damping λ.

    Attributes:
        damping: λ itself, ≥ 0; or ``matched``: 1/(ηt) for each recorded step t (see ``matching``), so that there is an
            estimate for each.
        damping_scale: λ as a multiple of the mean squared entry of the per-example training gradients over
            all of 𝒟 and all parameters (Grosse et al. 2023, section 5.1, for the scale). At most one of the
            two is given; neither means matched where the estimator can be, else its ``default_scale``.
    """

    default_scale: ClassVar[float] = 1.0
    matches: ClassVar[bool] = False
    """Whether the estimator can be matched."""

    damping: float | Literal["matched"] | None = None
    damping_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.damping is None or self.damping_scale is None,
            "give damping (matched, or λ itself) or damping_scale (times the mean squared gradient entry), not both",
        )
        self.require(self.matches or self.damping != "matched", "damping cannot be matched; give a number")
        self.require(not isinstance(self.damping, int | float) or self.damping >= 0, "damping must be at least 0")
        self.require(self.damping_scale is None or self.damping_scale >= 0, "damping_scale must be at least 0")
        if self.damping is None and self.damping_scale is None:
            self.settle(**({"damping": "matched"} if self.matches else {"damping_scale": self.default_scale}))

    @property
    def is_matched(self) -> bool:
        """Whether there is a λ for each recorded step."""
        return self.damping == "matched"

    def follows_training(self) -> bool:
        """A matched λ is of the optimizer and the amount."""
        return self.is_matched or super().follows_training()


@dataclass(frozen=True)
class Influence(Damped):
    """Of the influence functions.

    Attributes:
        training_gradient: which training side r_i; see ``fimo.estimators.influence``.
        displacement_step: the step of the sweep whose mean baseline displacement is Δθ̂(𝒟); None = the estimator's own
            solve, −P ∇L(θᶠ) with L the mean training loss. Not used by ``final``.
    """

    training_gradient: Literal["final", "corrected", "further"] = "final"
    displacement_step: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.displacement_step is None or self.training_gradient != "final",
            "displacement_step needs training_gradient corrected or further",
        )

    def follows_training(self) -> bool:
        """A displacement is the sweep's own baseline's."""
        return self.displacement_step is not None or super().follows_training()

    def follows_seeds(self, seeds: Sequence[int], after: int | None = None) -> tuple[int, ...]:
        """A displacement is the mean over all seeds."""
        return tuple(seeds) if self.displacement_step is not None else ()


@dataclass(frozen=True)
class Factored(Declaration):
    """Of the estimators on EK-FAC's factorisation.

    Attributes:
        fisher: exact (a backward pass for every output), sampled (labels drawn from the model), or auto: exact for
            few outputs; which one was used, and what was drawn, is in the notes.
        samples: draws an example if sampled; of a language model a draw is a label for every token.
        seed: of the draws.
    """

    fisher: Literal["auto", "exact", "sampled"] = "auto"
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.samples >= 1, "samples must be at least 1")


@dataclass(frozen=True)
class SGDMatched(Declaration):
    """Of the influence functions matched to the amount of further training."""

    def follows_training(self) -> bool:
        """The optimizer and the recorded steps decide the values."""
        return True


@dataclass(frozen=True)
class OwnSeeds(Declaration):
    """Of the estimators whose values are a mean over seeds that they train with.

    Attributes:
        seeds: how many; None = as many as the sweep has, at most ``most_seeds``.
        own_seeds: the sweep's own, the first ones: a check of the estimator, not an estimate to be scored.
        last_step: estimate no amounts beyond this step, and train no further; None = all.
    """

    most_seeds: ClassVar[int | None] = None
    """Seeds at most if their number is not given."""

    seeds: int | None = None
    own_seeds: bool = False
    last_step: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.seeds is None or self.seeds >= 1, "seeds must be at least 1")
        self.require(self.last_step is None or self.last_step >= 1, "last_step must be at least 1")

    def follows_training(self) -> bool:
        """Every step is the sweep's own."""
        return True

    def runs(self, seeds: Sequence[int], after: int | None = None) -> tuple[int, ...]:
        """Those directly after the sweep's largest, or from ``after`` on; with ``own_seeds`` the sweep's first ones."""
        count = self.seeds if self.seeds is not None else len(seeds[: self.most_seeds])
        if self.own_seeds or not seeds:
            return tuple(seeds)[:count]
        first = max(seeds) + 1 if after is None else after
        return tuple(range(first, first + count))

    def follows_seeds(self, seeds: Sequence[int], after: int | None = None) -> tuple[int, ...]:
        """``runs``: a sweep that grows into them has the values computed anew."""
        return self.runs(seeds, after)
