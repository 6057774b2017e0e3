"""``fimo status``: how far a sweep is, from the store alone."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from fimo.orchestrator.commands.app import (
    JsonOption,
    SweepArgument,
    app,
    exit_with,
    print_json,
    print_lines,
    talk,
)

WATCH_EVERY_S = 5.0


@app.command()
def status(
    sweep: SweepArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every few seconds until it is complete.")] = False,
    as_json: JsonOption = False,
) -> None:
    """How far a sweep is, from the store alone."""
    from fimo.orchestrator.report.status import status_lines
    from fimo.orchestrator.run.status import sweep_status
    from fimo.orchestrator.sweep.sweep import open_sweep

    values = _watch(sweep) if watch and not as_json else sweep_status(open_sweep(sweep))
    if as_json:
        print_json(values)
    else:
        print_lines(status_lines(values))
    exit_with(values["exit_code"])


def _watch(uri: str) -> dict[str, Any]:
    """Show a sweep's status on stderr until it is complete or interrupted; wait for a store that does not answer."""
    from rich.live import Live
    from rich.text import Text

    from fimo.orchestrator.report.status import status_lines
    from fimo.orchestrator.run.status import sweep_status
    from fimo.orchestrator.sweep.sweep import open_sweep
    from fimo.workers.errors import StoreError

    values = sweep_status(open_sweep(uri))
    with Live(console=talk, transient=True, auto_refresh=False) as live:
        while not values["complete"]:
            live.update(Text("\n".join(status_lines(values))), refresh=True)
            try:
                time.sleep(WATCH_EVERY_S)
                values = sweep_status(open_sweep(uri))
            except StoreError as error:
                live.update(Text(f"{error}; trying again"), refresh=True)
            except KeyboardInterrupt:
                break
    return values
