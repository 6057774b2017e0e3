"""What ``fimo amount`` prints: a row for each amount, and the recommendation; text only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from fimo.orchestrator.report.show import number
from fimo.orchestrator.run.amount import Amounts
from fimo.orchestrator.tables.advice import faults
from fimo.orchestrator.tables.amounts import Linear


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


def amounts_tables(found: Amounts) -> Iterator[Table]:
    """Two tables with a row for each amount: what decides, and what it was measured on."""
    alone, weighed = len(found.amounts) == 1, found.weighed is not None and bool(found.weighed.effects)
    names = ["reliability", "ceiling", "before", "after", "limit", *(["smooth"] if weighed else [])]
    table = _empty("amounts of further training, in steps", names)
    table.add_column("against it")
    for a in found.amounts:
        values = [a.reliability, a.ceiling, a.before, a.after, a.first_order, *([a.metasmoothness] if weighed else [])]
        table.add_row(str(a.step), *map(number, values), ", ".join(faults(a, alone)))
    yield table
    names = ["drift", "moved", "drowned", "significant", *(["×10", "×100"] if weighed else [])]
    table = _empty("their effects", names)
    for a in found.amounts:
        sizes = ("–" if value is None else f"{value:.3g}" for value in (a.distance, a.relative))
        shares = ("–" if value is None else f"{value:.0%}" for value in (a.under_floor, a.significant))
        table.add_row(str(a.step), *sizes, *shares, *(_linear(pair) for pair in a.linear if pair.against == 1))
    yield table


def _empty(title: str, names: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("step", *names):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _linear(pair: Linear) -> str:
    return "–" if pair.cosine is None or pair.size is None else f"{pair.cosine:.3f}, size {pair.size:.3g}"


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
