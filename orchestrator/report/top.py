"""What ``fimo top`` prints: the removals that move an evaluation example most; text only, no I/O."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from fimo.orchestrator.tables.top import Effect, Top

NAMES, WIDTH = 3, 40
"""Members of a group that are named, in so many characters at most."""


def top_json(top: Top, count: int) -> dict[str, Any]:
    """For ``--json``."""
    helpful, harmful = top.shown(count)
    about = asdict(top)
    about.pop("effects")
    return {**about, "helpful": [asdict(e) for e in helpful], "harmful": [asdict(e) for e in harmful]}


def top_lines(top: Top) -> list[str]:
    """The sentences above the table."""
    told = sum(bool(e.told) for e in top.effects)
    moved = "" if top.training_only is None else f"; training on everything moves it by {top.training_only:+.3g}"
    g = (
        "g at the final model is not recorded"
        if top.at_final is None
        else f"g is {top.at_final:.4g} at the final model"
    )
    seeds = "1 seed, so that no effect has an interval" if top.seeds < 2 else f"{top.seeds} seeds"
    return [
        f"evaluation example {top.eval} after step {top.step} (epoch {top.epoch:.3g}): {g}{moved}",
        f"{len(top.effects)} removals, {seeds}; {told} of them can be told from zero (5% of those falsely)",
    ]


def top_table(top: Top, count: int) -> Table:
    """At most ``count`` helpful and ``count`` harmful removals: effect, 95% interval, share of g."""
    table = Table()
    table.add_column("removal", overflow="fold")
    for name in ("effect", "95% interval", "of |g|"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for part in top.shown(count):
        for effect in part:
            table.add_row(
                named(effect),
                f"{effect.effect:+.2e}",
                "–" if effect.low is None else f"{effect.low:+.1e} to {effect.high:+.1e}",
                "–" if effect.relative is None else f"{effect.relative:+.1%}",
                ("helpful" if effect.helpful else "harmful") + ("" if effect.told else "?"),
            )
        table.add_section()
    return table


def named(effect: Effect) -> str:
    """A removal by its name, and by what leads back to the user's rows; of a group only the first few members."""
    own = effect.ids or tuple(map(str, effect.indices))
    if len(own) == 1:
        label = "" if effect.labels is None else f": {effect.labels[0]}"
        return (effect.name if own[0] == effect.name else f"{effect.name} ({own[0]})") + label
    first = ", ".join(own[:NAMES])
    shown = first if len(first) <= WIDTH else first[: WIDTH - 1] + "…"
    return f"{effect.name} ({len(own)} examples: {shown}{', …' if len(own) > NAMES else ''})"
