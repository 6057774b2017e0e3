"""``fimo search``: which hyper-parameters of estimators, and which further training, are best."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fimo.orchestrator.commands.app import (
    JsonOption,
    SpecArgument,
    StoreOption,
    app,
    exit_with,
    out,
    print_json,
    print_lines,
    talk,
    tell,
    tell_store,
)
from fimo.orchestrator.commands.run import stop_on_signal

if TYPE_CHECKING:
    import pyarrow as pa


@app.command()
def search(
    spec: SpecArgument,
    store: StoreOption,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Write search.parquet and the figure here too.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Which hyper-parameters of estimators agree best with a sweep, by its spec's section `search`; on Ray Tune."""
    from fimo.orchestrator.report.search import SearchProgress, found_json, found_lines, found_table
    from fimo.orchestrator.resolve.resolved import resolve
    from fimo.orchestrator.search.estimators import search_estimators
    from fimo.orchestrator.search.place import on_tune
    from fimo.orchestrator.search.tabled import matched_dampings, search_table
    from fimo.orchestrator.spec.spec import read_file
    from fimo.orchestrator.store import open_store
    from fimo.workers.errors import UsageError

    opened, parsed = open_store(store), read_file(spec)
    if parsed.search is None:
        raise UsageError(f"{spec} has no section search: say there which estimators to try (docs/search.md)")
    resolved, stop = resolve(parsed, spec.resolve().parent), stop_on_signal()
    tell_store()
    again = f"{shlex.quote(str(spec))} --store {shlex.quote(store)}"
    with SearchProgress(talk) as progress:
        found = search_estimators(
            resolved, opened, parsed.search, on_tune, progress.listener, stop, typed=f"fimo run {again}"
        )
    manifest = resolved.manifest
    table = search_table(found, manifest)
    uri = _put(opened, manifest.spec.name, "search", table)
    written = [uri, *(_files(table, to) if to is not None else [])]
    matched = dict(zip(found.steps, matched_dampings(manifest, found.steps), strict=True))
    if as_json:
        print_json({**found_json(found, matched), "written": written})
    else:
        out.print(found_table(found, matched))
        print_lines([*found_lines(found), *written])
    for line in found.errors:
        tell(f"fimo: {line}")
    if found.stopped is not None:
        left = found.points - len(found.tried)
        tell(f"fimo: {found.stopped}; {left} points are left: `fimo search {again}` goes on from here")
    exit_with(found.exit_code)


def _put(store: Any, sweep: str, name: str, table: pa.Table) -> str:
    from fimo.orchestrator.sweep import keys
    from fimo.orchestrator.tables import schemas

    key = keys.table(sweep, name)
    store.put(key, schemas.encode_table(table))
    return f"{store.uri.rstrip('/')}/{key}"


def _files(table: pa.Table, folder: Path) -> list[str]:
    """The table and its figure, in three formats, in a folder; raises StoreError."""
    from fimo.orchestrator.report.figures.search import search_figure
    from fimo.orchestrator.tables import schemas
    from fimo.workers.errors import StoreError, UsageError

    written = [folder / "search.parquet"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written[0].write_bytes(schemas.encode_table(table))
        try:
            figure: Any = search_figure(table).figure
        except UsageError as error:
            tell(f"fimo: no figure: {error}")
            return [str(written[0])]
        for kind in ("svg", "pdf", "png"):
            written.append(folder / f"search.{kind}")
            figure.savefig(written[-1], dpi=160)
    except OSError as error:
        raise StoreError(f"cannot write to {folder}: {error.strerror or error}") from error
    return [str(path) for path in written]
