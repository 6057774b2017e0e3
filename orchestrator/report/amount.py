"""What ``fimo amount`` prints: a row for each amount, and the recommendation; text only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.table import Table

from fimo.orchestrator.run.amount import Amounts
from fimo.orchestrator.tables.advice import faults
from fimo.orchestrator.tables.amounts import Amount, Linear


def amounts_json(found: Amounts) -> dict[str, Any]:
    """The amounts and the recommendation as plain values."""
    alone, weighed = len(found.amounts) == 1, found.weighed
    return {
        "sweep": found.sweep,
        "recorded": found.recorded,
        "limit": found.limit,
        "amounts": [
            {
                **asdict(a),
                "linear": [asdict(x) for x in a.linear],
                "stability": a.stability,
                "against": faults(a, alone),
            }
            for a in found.amounts
        ],
        "advice": asdict(found.advice),
        "removal_weight": None if weighed is None else weighed.weight,
        "cells": None if weighed is None else len(weighed.cells),
        "cells_trained": 0 if weighed is None else weighed.trained,
        "complete": found.complete,
        "notes": list(found.notes),
        "exit_code": 0 if found.complete else 3,
    }


def amounts_table(found: Amounts) -> Table:
    """A row for each amount; what speaks against it last."""
    weighed = found.weighed is not None and bool(found.weighed.effects)
    table = Table(title="amounts of further training, in steps", title_justify="left")
    names = ["step", "drift", "moved", "reliability", "ceiling", "drowned", "significant", "before", "after", "limit"]
    for name in names + (["smooth", "×10", "×100"] if weighed else []):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("against it")
    alone = len(found.amounts) == 1
    for a in found.amounts:
        table.add_row(*_row(a, weighed), ", ".join(faults(a, alone)))
    return table


def _row(a: Amount, weighed: bool) -> Iterator[str]:
    yield str(a.step)
    yield "–" if a.distance is None else f"{a.distance:.3g}"
    yield "–" if a.relative is None else f"{a.relative:.3g}"
    for value in (a.reliability, a.ceiling):
        yield _two(value)
    for share in (a.under_floor, a.significant):
        yield "–" if share is None else f"{share:.0%}"
    for value in (a.before, a.after, a.first_order):
        yield _two(value)
    if weighed:
        yield _two(a.metasmoothness)
        yield from (_linear(pair) for pair in a.linear if pair.against == 1)


def _linear(pair: Linear) -> str:
    return "–" if pair.cosine is None or pair.size is None else f"{pair.cosine:.3f}, {pair.size:.2f}"


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def legend(found: Amounts) -> Iterator[str]:
    """What the columns are."""
    yield (
        "drift ‖Δθ‖; moved: training on everything moves g by so much of its size at the final model; drowned: pairs "
        "under the noise floor; significant: pairs that differ from zero"
    )
    yield (
        "before, after: agreement (cosine) with the neighbouring amounts, limit: with the infinitesimal limit "
        f"({found.limit}), in shares of what noise leaves possible"
    )
    weighed = found.weighed
    if weighed is not None and weighed.effects:
        yield (
            f"smooth: metasmoothness (Engstrom et al. 2025, definition 2) at removal weights {weighed.weight:g} and "
            f"{2 * weighed.weight:g}; ×10, ×100: effects at so many times the weight, cosine and size per unit of it; "
            f"{len(weighed.cells)} cells"
        )


def advice_lines(found: Amounts) -> Iterator[str]:
    """The recommendation, then its reasons."""
    yield from found.advice.lines
