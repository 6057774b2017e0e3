"""``fimo estimate`` and ``fimo import-scores``: scores without, or beside, further training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from fimo.orchestrator.commands.cli import (
    JsonOption,
    SpecArgument,
    StoreOption,
    SweepArgument,
    app,
    finish,
    out,
    print_json,
    read_spec,
    talk,
)


@app.command()
def estimate(
    spec: SpecArgument,
    store: StoreOption,
    address: Annotated[str | None, typer.Option("--address", help="A running Ray; default: an embedded one.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try tasks again that were set aside.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a spec's estimators alone; no further training."""
    from fimo.orchestrator.run import driver as runs
    from fimo.orchestrator.store import open_store

    opened = open_store(store)
    resolved = runs.resolve(read_spec(spec), spec.resolve().parent)
    finish(resolved, opened, address, retry_failed, as_json, shards=False)


@app.command("import-scores")
def import_scores(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="removal × eval: Parquet, npy or safetensors.")],
    sweep: SweepArgument,
    name: Annotated[str, typer.Option("--name", help="How the scores are called in tables.")],
    negate: Annotated[bool, typer.Option("--negate", help="The library counts a helpful example as negative.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Score another library's matrix beside fimo's; positive must mean that removing the example raises g."""
    from fimo.orchestrator.commands import commands

    found = commands.import_scores(file, sweep, name, negate)
    if as_json:
        print_json(found.json)
        return
    if found.table is not None:
        out.print(found.table)
    talk.print(f"{name}: kept in {found.json['sweep']}", highlight=False, markup=False, soft_wrap=True)
