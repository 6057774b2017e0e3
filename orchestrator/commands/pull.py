"""``fimo pull``: a sweep's tables as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fimo.orchestrator.commands.app import (
    JsonOption,
    SweepArgument,
    app,
    exit_with,
    print_json,
    print_lines,
    tell,
)


@app.command()
def pull(
    sweep: SweepArgument,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Where the tables go.")],
    form: Annotated[str, typer.Option("--format", help="parquet or csv.")] = "parquet",
    as_json: JsonOption = False,
) -> None:
    """Bring a sweep's tables, reduced anew if parts have come since."""
    values = pull_tables(sweep, to, form, tell)
    if as_json:
        print_json(values)
    else:
        print_lines(values["tables"].values())
    exit_with(values["exit_code"])


def pull_tables(uri: str, to: Path, form: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Write a sweep's tables to a folder.

    Returns:
        tables (name -> path), complete, exit_code.

    Raises:
        UsageError: no such sweep or format.
        StoreError: the store cannot be read, or the folder not written.
    """
    from fimo.orchestrator.report.status import status_lines
    from fimo.orchestrator.run.gather import current_tables
    from fimo.orchestrator.run.status import sweep_status
    from fimo.orchestrator.sweep.sweep import open_sweep
    from fimo.orchestrator.tables import schemas
    from fimo.workers.errors import StoreError, UsageError

    if form not in ("parquet", "csv"):
        raise UsageError(f"--format is parquet or csv, not '{form}'")
    sweep = open_sweep(uri)
    tables, complete = current_tables(sweep, sweep.read_manifest(), say)
    written = {}
    try:
        to.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            path = to / f"{name}.{form}"
            path.write_bytes(schemas.encode_table(table) if form == "parquet" else schemas.encode_csv(table))
            written[name] = str(path)
    except OSError as error:
        raise StoreError(f"cannot write to {to}: {error.strerror or error}") from error
    if not complete:
        status = sweep_status(sweep)
        rest = "" if status["complete"] else f"; {status_lines(status)[-1]}"
        say(f"these tables hold what is there{rest}")
    return {"tables": written, "complete": complete, "exit_code": 0 if complete else 3}
