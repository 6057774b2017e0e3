"""What becomes of tasks: receipts, losses, errors, and how a drive through them ended. Values, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field

from fimo.orchestrator.run.work import Task
from fimo.workers.errors import FimoError


class UnableError(FimoError):
    """A node cannot begin a task: it lacks a package or a file, or its code or data are others.

    Attributes:
        node: Ray's id of it; empty in a process of the driver's own.
    """

    def __init__(self, line: str, node: str = "") -> None:
        super().__init__(line, node)
        self.node = node

    def __str__(self) -> str:
        return str(self.args[0])


class CannotEstimateError(FimoError):
    """An estimator cannot give values for this model: no other try, moment or machine changes that."""


class ConflictError(FimoError):
    """Another writer committed different rows under the same key."""


class ApartError(FimoError):
    """Shards cannot be trained together on this model: another time they need not be handed over so."""


class NoWitnessError(FimoError):
    """A witness costs too much: no other try changes that."""


class TooDearError(FimoError):
    """An estimator of the default set would cost more than it may."""


@dataclass(frozen=True)
class Receipt:
    """What a finished task says of itself.

    Attributes:
        key: the committed object.
        written: by this task, rather than met there.
        cells: in it, 0 for estimates and witnesses; ``diverged``: how many of its runs were not finite.
        seconds: wall time of the task.
        lines: what a person should know of it.
        node: Ray's id of where it ran; empty in a process of the driver's own.
        each: the receipts of shards that were done together, in their order; the rest is then said of all of them.
    """

    key: str
    written: bool
    cells: int
    diverged: int
    seconds: float
    device: str
    lines: tuple[str, ...] = ()
    node: str = ""
    each: tuple[Receipt, ...] = ()


@dataclass(frozen=True)
class Lost:
    """The worker or node died, or a deadline passed; not the task's own error."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """The task raised."""

    error: BaseException
    traceback: str


Result = Receipt | Lost | Failed


@dataclass(frozen=True)
class SetAside:
    """A task given up, with its last error.

    Attributes:
        final: an estimator's own verdict, the same at every try.
        dear: it is over the budget of the default set, which is no verdict on an estimator that the spec names.
    """

    task: Task
    line: str
    traceback: str
    final: bool = False
    dear: bool = False


@dataclass
class Outcome:
    """How a drive ended.

    Attributes:
        stopped: why it ended early, None if every task was finished or set aside.
        broken: the circuit breaker opened: nothing was set aside for good.
        lost: how often a task's worker or node died, or a deadline passed.
    """

    receipts: list[Receipt] = field(default_factory=list)
    set_aside: list[SetAside] = field(default_factory=list)
    stopped: str | None = None
    broken: bool = False
    lost: int = 0


def error_line(error: BaseException) -> str:
    """The first line of an error, with its type unless it is one of fimo's own."""
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, FimoError) else f"{type(error).__name__}: {text}"
