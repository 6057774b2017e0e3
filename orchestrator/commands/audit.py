"""``fimo audit``: how far somebody else's ground truth can be trusted, and what it can tell of methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fimo.orchestrator.commands.app import JsonOption, app, out, print_json, print_lines, tell


@app.command()
def audit(
    effects: Annotated[
        Path, typer.Argument(metavar="EFFECTS", help="(seeds, removals, evals): npy, safetensors or Parquet.")
    ],
    estimates: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=]ESTIMATES", help="Methods' (removals, evals) matrices, in the same formats."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Reliability, ceilings and significance of a ground truth; scores of methods, and which differences are noise."""
    from fimo.orchestrator.report.audit import audit_json, audit_lines, audit_tables
    from fimo.orchestrator.run.arrays import read_effects, read_estimates
    from fimo.orchestrator.tables.audit import audit as audited
    from fimo.workers.errors import UsageError

    truth, methods = read_effects(effects), {}
    for given in estimates or ():
        for name, matrix in read_estimates(given).items():
            if name in methods:
                raise UsageError(
                    f"two methods are called '{name}': name one of them, NAME={given.partition('=')[2] or given}"
                )
            methods[name] = matrix.beside(truth, name)
    found = audited(truth.values, methods)
    for line in found.notes:
        tell(f"fimo: {line}")
    if as_json:
        print_json(audit_json(found))
        return
    print_lines(audit_lines(found))
    for table in audit_tables(found):
        out.print(table)
