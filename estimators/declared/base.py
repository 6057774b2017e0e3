"""What an estimator says of itself, without what it computes: hyper-parameters, and what its values depend on.

Nothing here imports torch, so that a sweep's progress can be told from its store in no time. An estimator's class
inherits from its declaration, hence the two cannot disagree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from fimo.workers.errors import UsageError

JSON: TypeAlias = "str | int | float | bool | Sequence[JSON] | Mapping[str, JSON] | None"


@dataclass(frozen=True)
class Declaration:
    """Base of the declarations: their fields are an estimator's hyper-parameters and nothing else is."""

    name: ClassVar[str]

    version: ClassVar[int] = 1
    """Raise it whenever the estimator's numbers change: kept estimates of another version are computed again."""

    evals_together: ClassVar[int] = 128
    """Evaluation examples in one block of estimates, which is one task and one object of a sweep."""

    trains: ClassVar[bool] = False
    """Whether it trains in the sweep's stacks, whose engine is then proven first (``Problem.start``)."""

    units: ClassVar[str] = "n times an effect"
    """What a value is of an effect, as far as the estimator's model of training holds; n: training examples."""

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense; a subclass calls its base's."""

    def params(self) -> dict[str, JSON]:
        """Every hyper-parameter by name, defaults included."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def follows_training(self) -> bool:
        """Whether the values depend on the further-training section."""
        return False

    def follows_seeds(self, seeds: Sequence[int], after: int | None = None) -> tuple[int, ...]:
        """Those of the sweep's seeds that the values depend on; ``after`` as for ``runs``."""
        return ()

    def runs(self, seeds: Sequence[int], after: int | None = None) -> tuple[int, ...]:
        """The seeds that the estimator itself trains with, given the sweep's: its values are the mean over them.

        ``after``: the first seed that the sweep never uses, if it may still come to use more than ``seeds``.
        """
        return ()

    def require(self, condition: bool, message: str) -> None:
        """Refuse a hyper-parameter.

        Raises:
            UsageError: ``condition`` is false; the message is prefixed with the estimator's name.
        """
        if not condition:
            raise UsageError(f"estimator {self.name}: {message}")

    def settle(self, **values: Any) -> None:
        """Set fields of the frozen dataclass, in ``__post_init__`` alone."""
        for name, value in values.items():
            object.__setattr__(self, name, value)
