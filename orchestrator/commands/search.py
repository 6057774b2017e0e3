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
    from collections.abc import Callable

    import pyarrow as pa

    from fimo.orchestrator.resolve.resolved import Resolved
    from fimo.orchestrator.search.place import Place
    from fimo.orchestrator.spec.search import Search, SearchedTraining
    from fimo.orchestrator.store import Store


@app.command()
def search(
    spec: SpecArgument,
    store: StoreOption,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Write search.parquet and the figure here too.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The best hyper-parameters of estimators, and further training, by the spec's section `search`; on Ray Tune."""
    from fimo.orchestrator.resolve.resolved import resolve
    from fimo.orchestrator.search.place import on_tune
    from fimo.orchestrator.spec.spec import read_file
    from fimo.orchestrator.store import open_store
    from fimo.workers.errors import UsageError

    opened, parsed = open_store(store), read_file(spec)
    if parsed.search is None:
        raise UsageError(f"{spec} has no section search: say there what to try (docs/search.md)")
    resolved, stop = resolve(parsed, spec.resolve().parent), stop_on_signal()
    tell_store()
    again, told, codes = f"{shlex.quote(str(spec))} --store {shlex.quote(store)}", dict[str, Any](), list[int]()
    with on_tune() as place:
        if parsed.search.estimators is not None:
            told["estimators"] = _estimators(resolved, opened, parsed.search, place, stop, again, to, as_json)
            codes.append(told["estimators"]["exit_code"])
        if parsed.search.further_training is not None and stop() is None:
            section = parsed.search.further_training
            told["further_training"] = _training(resolved, opened, section, place, stop, again, to, as_json)
            codes.append(told["further_training"]["exit_code"])
        if stop() is not None and max(codes, default=0) == 0 and parsed.search.further_training is not None:
            codes.append(3 if "further_training" not in told else 0)
    # Stopped counts before failed: what is missing is told by running it again.
    code = 3 if 3 in codes else max(codes, default=0)
    if as_json:
        print_json({**told, "exit_code": code})
    exit_with(code)


def _estimators(
    resolved: Resolved,
    store: Store,
    section: Search,
    place: Place,
    stop: Callable[[], str | None],
    again: str,
    to: Path | None,
    as_json: bool,
) -> dict[str, Any]:
    from fimo.orchestrator.report.search import SearchProgress, found_json, found_lines, found_table
    from fimo.orchestrator.search.estimators import search_estimators
    from fimo.orchestrator.search.tabled import matched_dampings, search_table

    with SearchProgress(talk) as progress:
        found = search_estimators(resolved, store, section, place, progress.listener, stop, typed=f"fimo run {again}")
    manifest = resolved.manifest
    table = search_table(found, manifest)
    written = [_put(store, manifest.spec.name, "search", table), *(_files(table, to) if to is not None else [])]
    matched = dict(zip(found.steps, matched_dampings(manifest, found.steps), strict=True))
    if not as_json:
        out.print(found_table(found, matched))
        print_lines([*found_lines(found), *written])
    for line in found.errors:
        tell(f"fimo: {line}")
    if found.stopped is not None:
        left = found.points - len(found.tried)
        tell(f"fimo: {found.stopped}; {left} points are left: `fimo search {again}` goes on from here")
    return {**found_json(found, matched), "written": written}


def _training(
    resolved: Resolved,
    store: Store,
    section: SearchedTraining,
    place: Place,
    stop: Callable[[], str | None],
    again: str,
    to: Path | None,
    as_json: bool,
) -> dict[str, Any]:
    from fimo.orchestrator.report.search import SearchProgress
    from fimo.orchestrator.report.search_training import training_found_table, training_json, training_lines
    from fimo.orchestrator.search.tabled import training_table
    from fimo.orchestrator.search.training import search_training

    with SearchProgress(talk, "candidates") as progress:
        found = search_training(resolved, store, section, place, progress.listener, stop)
    table = training_table(found, resolved.manifest)
    written = [_put(store, resolved.manifest.spec.name, "search_training", table)]
    if to is not None:
        written += _write(table, to / "search_training.parquet")
    if not as_json:
        out.print(training_found_table(found))
        print_lines([*training_lines(found), *written])
    for line in found.errors:
        tell(f"fimo: {line}")
    if found.stopped is not None:
        tell(f"fimo: {found.stopped}; what is trained is kept: `fimo search {again}` goes on from here")
    return {**training_json(found), "written": written}


def _put(store: Store, sweep: str, name: str, table: pa.Table) -> str:
    from fimo.orchestrator.sweep import keys
    from fimo.orchestrator.tables import schemas

    key = keys.table(sweep, name)
    store.put(key, schemas.encode_table(table))
    return f"{store.uri.rstrip('/')}/{key}"


def _write(table: pa.Table, path: Path) -> list[str]:
    from fimo.orchestrator.tables import schemas
    from fimo.workers.errors import StoreError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(schemas.encode_table(table))
    except OSError as error:
        raise StoreError(f"cannot write to {path.parent}: {error.strerror or error}") from error
    return [str(path)]


def _files(table: pa.Table, folder: Path) -> list[str]:
    """The table and its figure, in three formats, in a folder; raises StoreError."""
    from fimo.orchestrator.report.figures.search import search_figure
    from fimo.orchestrator.report.figures.style import encode, styled
    from fimo.workers.errors import StoreError, UsageError

    written = _write(table, folder / "search.parquet")
    try:
        with styled():
            figure = search_figure(table).figure
            files = {kind: encode(figure, kind) for kind in ("svg", "pdf", "png")}
        for kind, data in files.items():
            (folder / f"search.{kind}").write_bytes(data)
            written.append(str(folder / f"search.{kind}"))
    except UsageError as error:
        tell(f"fimo: no figure: {error}")
    except OSError as error:
        raise StoreError(f"cannot write to {folder}: {error.strerror or error}") from error
    return written
