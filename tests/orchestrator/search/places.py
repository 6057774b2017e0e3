"""Trials in this process, for tests that need no Ray."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


class Here:
    """A place that runs trials one after another, every rung of each, and notes which it was given."""

    def __init__(self, most: int | None = None) -> None:
        self.given: list[str] = []
        self.ran: list[tuple[str, int]] = []
        self.most = most

    @contextlib.contextmanager
    def __call__(self, manifest: Any) -> Iterator[Callable[..., dict[str, str]]]:
        yield self.run

    def run(
        self,
        names: Sequence[str],
        work: Callable[[str, int, int], float],
        told: Callable[[str, int], None],
        should_stop: Callable[[], str | None],
        rungs: Sequence[int] = (1,),
        kept: Mapping[tuple[str, int], bool] | None = None,
        note: Any = None,
    ) -> dict[str, str]:
        for name in names:
            self.given.append(name)
            for rung in rungs:
                if should_stop() is not None or (self.most is not None and len(self.ran) >= self.most):
                    return {}
                work(name, rung, 0)
                self.ran.append((name, rung))
                told(name, rung)
                goes_on = (kept or {}).get((name, rung), True)
                if note is not None and (name, rung) not in (kept or {}) and rung != rungs[-1]:
                    note(name, rung, goes_on)
                if not goes_on:
                    break
        return {}
