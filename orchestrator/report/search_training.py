"""What ``fimo search`` prints of further training: each candidate at its best step, and the winner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.table import Table

from fimo.orchestrator.report.show import duration, number
from fimo.orchestrator.search.training import FoundTraining, Rung
from fimo.orchestrator.tables.worth import UNDER, VANISHES, Worth, best_step


def training_found_table(found: FoundTraining) -> Table:
    """A row for each candidate: its best step, or its last if none can be taken, and what speaks against that."""
    table = Table(title="further training, by reliability for a device-second", title_justify="left")
    table.add_column("further training", overflow="fold")
    for name in ("step", "seeds", "reliable", "s a seed", "per s", "‖Δθ‖"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for place, rung in enumerate(found.last):
        row = _shown(rung)
        if row is None:
            continue
        worth = row.per_second(rung.seeds)
        sizes = ("–" if value is None else f"{value:.3g}" for value in (row.seconds, worth, row.distance))
        won = found.winner is not None and found.winner[0] == place
        said = row.fault or ("best" if won else "given up" if rung.stopped else "")
        table.add_row(named(rung), str(row.step), str(rung.seeds), number(row.reliability), *sizes, said)
    return table


def _shown(rung: Rung) -> Worth | None:
    place = best_step(rung.rows, rung.seeds)
    if place is None:
        return rung.rows[-1] if rung.rows else None
    return rung.rows[place]


def named(rung: Rung) -> str:
    """A candidate for people."""
    one = rung.candidate
    return f"{one.optimizer} {one.lr:g} {one.removal_mode}"


def training_lines(found: FoundTraining) -> Iterator[str]:
    """The winner, and what the columns are."""
    if found.winner is None:
        yield "no further training can be advised: each is drowned in rounding, vanishing, exploded or unknown"
    else:
        rung, step = found.last[found.winner[0]], found.winner[1]
        yield f"best: {named(rung)}, {step} steps, with {rung.seeds} seeds"
    yield (
        f"reliable: of the mean over so many seeds; per s: that for a device-second of all of them; {UNDER}: rounding "
        f"drowns the effects; {VANISHES}: training moves g by under a thousandth; such are never best"
    )
    given_up = sum(rung.stopped for rung in found.last)
    yield (
        f"{len(found.last)} of {found.candidates} candidates, {given_up} given up early, {found.computed} rungs "
        f"computed now in {duration(found.seconds)}"
    )


def training_json(found: FoundTraining) -> dict[str, Any]:
    """The same as plain values."""
    winner = None
    if found.winner is not None:
        rung = found.last[found.winner[0]]
        winner = {**_candidate(rung), "step": found.winner[1], "seeds": rung.seeds}
    return {
        "sweep": found.sweep,
        "candidates": [
            {
                **_candidate(rung),
                "seeds": rung.seeds,
                "stopped": rung.stopped,
                "device": rung.device,
                "steps": [{**asdict(row), "per_device_second": row.per_second(rung.seeds)} for row in rung.rows],
            }
            for rung in found.last
        ],
        "best": winner,
        "computed": found.computed,
        "most_seeds": found.most,
        "seconds": found.seconds,
        "finished": found.finished,
        "stopped": found.stopped,
        "errors": list(found.errors),
        "exit_code": found.exit_code,
    }


def _candidate(rung: Rung) -> dict[str, Any]:
    one = rung.candidate
    return {"optimizer": one.optimizer, "lr": one.lr, "removal_mode": one.removal_mode}
