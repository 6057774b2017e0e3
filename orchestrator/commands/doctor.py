"""``fimo doctor``: what would fail later, found now."""

from __future__ import annotations

from typing import Annotated

import typer

from fimo.orchestrator.commands import places
from fimo.orchestrator.commands.app import JsonOption, app, exit_with, print_json, print_lines, tell


@app.command()
def doctor(
    store: Annotated[
        str | None,
        typer.Option(
            "--store", metavar="STORE", help="Check this store.", envvar=places.VARIABLE, callback=places.store_of
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", help="Check this Ray (http://HEAD:8265 from outside, auto on a node); else here."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What would fail later, found now."""
    from fimo.orchestrator.cluster.doctor import examine
    from fimo.orchestrator.run.provenance import versions

    checks = examine(store, address, tell)
    ok = all(check.ok for check in checks)
    if as_json:
        told = {"checks": [check.json() for check in checks], "ok": ok, "versions": versions()}
        print_json(told | {"exit_code": 0 if ok else 1})
    else:
        print_lines(check.line() for check in checks)
    exit_with(0 if ok else 1)
