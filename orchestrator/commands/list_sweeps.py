"""``fimo list``: the sweeps of a store."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from fimo.orchestrator.commands import places
from fimo.orchestrator.commands.app import JsonOption, app, out, print_json, tell


@app.command("list")
def list_sweeps(
    store: Annotated[
        str,
        typer.Argument(
            metavar="STORE", help="A directory or s3://bucket/prefix.", envvar=places.VARIABLE, callback=places.store_of
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """The sweeps of a store and how far each is, from one listing."""
    from fimo.orchestrator.report.sweeps import sweeps_table
    from fimo.orchestrator.run.listing import elsewhere, sweeps
    from fimo.orchestrator.store import LocalStore, open_store
    from fimo.workers.errors import UsageError

    opened = open_store(store)
    if isinstance(opened, LocalStore) and not opened.root.is_dir():
        raise UsageError(f"{store} is no folder: `fimo run SPEC --store {store}` makes it a store")
    found = sweeps(opened)
    if as_json:
        print_json({"store": store, "sweeps": found})
    elif found:
        out.print(sweeps_table(found, f"{store}{places.source()}"))
    else:
        near = elsewhere(opened)
        if near is None:
            tell(f"no sweep in {store}{places.source()}; `fimo run SPEC --store {store}` starts one")
        elif near:
            above = os.path.dirname(near)
            tell(f"no sweep in {store}{places.source()}, but in it: `fimo list {os.path.join(store, above)}`")
        else:
            tell(f"{store} is a sweep, no store of them: `fimo status {store}`")
