"""Which tasks take too long: a deadline drawn from those before, since a frozen node never says that it is one."""

from __future__ import annotations

from collections import deque
from statistics import median

from fimo.orchestrator.run.course import kind_of
from fimo.orchestrator.run.work import EstimateTask, Together, Work

LATE, LATE_S, LONGEST = 10.0, 60.0, 1.5
"""A task is given up after so many times what the last ones of its kind took, at least after so many seconds.

And never before so many times the longest, which may have had data to load and an engine to prove. Each time that it is
given up it is given twice as long: a slow node ends, a frozen one does not.
"""
STUCK, STUCK_S = 3.0, 8.0
"""A task that has run for so many times what the last ones took, and so many seconds, takes no place in the window."""
COPIED, COPIED_S = 1.5, 5.0
"""After so many times what the last ones took, and so many seconds, a task is worth a second copy at a run's end."""
FIRST, FIRST_S = 20.0, 1800.0
"""As ``LATE``, for a task while none of its kind has ended, by the longest of any kind."""
LAST = 20
"""Tasks of a kind whose median stands for it."""


class Lateness:
    """How long tasks of each kind have run, and how long others may.

    Args:
        deadline_s: what a task may run, if somebody has said it.
    """

    def __init__(self, deadline_s: float | None) -> None:
        self._deadline_s = deadline_s
        self._longest_s: dict[str, float] = {}
        # (seconds, size) of the last ones.
        self._last: dict[str, deque[tuple[float, int]]] = {}
        # Of these, by kind: asked for at every turn and of every task, so worked out when one ends.
        self._usual_s: dict[str, float] = {}
        self._smallest: dict[str, int] = {}
        self._given_up: dict[str, int] = {}

    def finished(self, task: Work, seconds: float) -> None:
        """Note how long a task has run."""
        kind = kind_of(task)
        self._longest_s[kind] = max(self._longest_s.get(kind, 0.0), seconds)
        last = self._last.setdefault(kind, deque(maxlen=LAST))
        last.append((seconds, _size(task)))
        self._usual_s[kind] = median(seconds for seconds, _ in last)
        self._smallest[kind] = min(size for _, size in last)

    def gave_up(self, task: Work) -> None:
        """Note that a task was given up: it has longer the next time."""
        self._given_up[repr(task)] = self._given_up.get(repr(task), 0) + 1

    def passed(self, task: Work, seconds: float) -> float | None:
        """What a task may run, in seconds, if it has run for longer; else None."""
        if self._deadline_s is None and seconds <= LATE_S:
            return None
        # A task's name is long: it is asked for last.
        first = self._first_limit(task)
        limit = None if first is None or seconds <= first else self.limit(task)
        return limit if limit is not None and seconds > limit else None

    def limit(self, task: Work) -> float | None:
        """Seconds that a task may run; None while nothing has finished."""
        first = self._first_limit(task)
        if first is None or self._deadline_s is not None:
            return first
        return float(first * 2 ** self._given_up.get(repr(task), 0))

    def _first_limit(self, task: Work) -> float | None:
        """The limit of a task that has not been given up."""
        if self._deadline_s is not None:
            return self._deadline_s
        if not self._longest_s:
            return None
        kind = kind_of(task)
        if kind not in self._usual_s:
            return max(FIRST_S, FIRST * max(self._longest_s.values()))
        larger = self._larger(task)
        return max(LATE_S, larger * LONGEST * self._longest_s[kind], larger * LATE * self._usual_s[kind])

    def is_stuck(self, task: Work, seconds: float) -> bool:
        """Whether a task that has run for so long may be on a node that has frozen."""
        if seconds <= STUCK_S:
            return False
        kind = kind_of(task)
        return kind in self._usual_s and seconds > STUCK * self._larger(task) * self._usual_s[kind] + STUCK_S

    def is_late(self, task: Work, seconds: float) -> bool:
        """Whether a task that has run for so long would most likely be done sooner if it were begun again elsewhere."""
        if seconds <= COPIED_S:
            return False
        kind = kind_of(task)
        return kind in self._usual_s and seconds > COPIED * self._larger(task) * self._usual_s[kind] + COPIED_S

    def _larger(self, task: Work) -> float:
        """How many times as large it is as the smallest of those that stand for its kind; 1 if it is smaller."""
        return max(1.0, _size(task) / self._smallest[kind_of(task)])


def _size(task: Work) -> int:
    """What the time of a task grows with, at most."""
    if isinstance(task, Together):
        return sum(map(_size, task.owed))
    count = task.count if isinstance(task, EstimateTask) else 1
    return max(1, len(task.removals)) * count
