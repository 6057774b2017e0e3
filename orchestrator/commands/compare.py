"""``fimo compare``: two gold standards against each other, from their stores alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fimo.orchestrator.commands import places
from fimo.orchestrator.commands.app import (
    JsonOption,
    SweepArgument,
    app,
    exit_with,
    out,
    print_json,
    print_lines,
    tell,
)

if TYPE_CHECKING:
    import pyarrow as pa


@app.command()
def compare(
    sweep: SweepArgument,
    other: Annotated[str, typer.Argument(metavar="SWEEP", help="The other one, STORE/NAME.", callback=places.sweep_of)],
    pair: Annotated[
        list[str] | None,
        typer.Option("--pair", metavar="STEP:STEP", help="Steps to compare; default: equal ones, or the last."),
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", metavar="FILE", help="Write the table: .parquet or .csv.")] = None,
    as_json: JsonOption = False,
) -> None:
    """How well two gold standards agree on the removals and evaluation examples that both have, and could at most."""
    from fimo.orchestrator.report.compare import comparison_json, comparison_tables, heading
    from fimo.orchestrator.run.comparing import compare_sweeps
    from fimo.orchestrator.sweep.sweep import open_sweep

    pairs = [read_pair(text) for text in pair or ()]
    check_file(to)
    comparison = compare_sweeps(open_sweep(sweep), open_sweep(other), pairs)
    values = comparison_json(comparison)
    if to is not None:
        write(comparison.table, to)
    if as_json:
        print_json(values)
    else:
        print_lines(heading(comparison))
        for table in comparison_tables(comparison):
            out.print(table)
        if to is not None:
            print_lines([str(to)])
    for line in comparison.notes:
        tell(f"fimo: {line}")
    exit_with(values["exit_code"])


def read_pair(text: str) -> tuple[int, int]:
    """STEP:STEP as numbers; raises UsageError."""
    from fimo.workers.errors import UsageError

    own, _, other = text.partition(":")
    if not (own.isascii() and own.isdigit() and other.isascii() and other.isdigit()):
        raise UsageError(f"--pair is STEP:STEP, a step of each sweep, such as 40:400, not '{text}'")
    return int(own), int(other)


def check_file(to: Path | None) -> None:
    """Refuse a name that is neither Parquet's nor CSV's (UsageError), before anything is read."""
    from fimo.workers.errors import UsageError

    if to is not None and to.suffix not in (".parquet", ".csv"):
        raise UsageError(f"--to is a file that ends in .parquet or .csv, not '{to}'")


def write(table: pa.Table, to: Path) -> None:
    """Write a table by its file's ending; raises StoreError."""
    from fimo.orchestrator.tables import schemas
    from fimo.workers.errors import StoreError

    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(schemas.encode_csv(table) if to.suffix == ".csv" else schemas.encode_table(table))
    except OSError as error:
        raise StoreError(f"cannot write to {to}: {error.strerror or error}") from error
