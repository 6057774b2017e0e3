"""The sweeps of a store as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.table import Table


def sweeps_table(found: Sequence[Mapping[str, Any]], title: str) -> Table:
    """One row a sweep, of ``fimo.orchestrator.run.listing.sweeps``; fits 80 columns, a long name is folded."""
    table = Table(title=title, title_justify="left")
    table.add_column("sweep", overflow="fold", min_width=12, ratio=1)
    for heading in ("cells", "seeds"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("last write", no_wrap=True)
    table.add_column("digest", no_wrap=True)
    for row in found:
        known = row["digest"] is not None
        table.add_row(
            row["name"],
            f"{row['done']}/{row['cells']}" if known else "–",
            (f"{row['seeds_complete']}/" if row["seeds_complete"] < row["seeds"] else "") + str(row["seeds"])
            if known
            else "–",
            row["state"],
            datetime.fromisoformat(row["last_write"]).astimezone().strftime("%y-%m-%d %H:%M"),
            row["digest"][:8] if known else "–",
        )
    return table
