"""Consoles on which text of somebody else's cannot move the cursor, colour anything or pose as a link.

A store may be anybody's, and names, notes and errors from it stand in every table.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.measure import Measurement
from rich.segment import Segment

from fimo.workers.errors import plain


class _Plain:
    """A renderable whose text loses its control characters; what rich itself puts in is kept."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self._inner, options):
            yield Segment(text if control else plain(text), style, control)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._inner)


class _Hook(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return list(_plained(renderables))


def _plained(renderables: Iterable[ConsoleRenderable]) -> Iterable[ConsoleRenderable]:
    # rich's own controls have no text, and Live looks for the objects that it handed in.
    return (each if type(each).__name__ == "Control" else _Plain(each) for each in renderables)


def make_console(*, width: int | None = None, stderr: bool = False) -> Console:
    """A console on stdout, or on stderr; text in brackets is text."""
    made = Console(markup=False, emoji=False, width=width, stderr=stderr)
    made.push_render_hook(_Hook())
    return made
