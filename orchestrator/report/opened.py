"""A sweep in its store as what a report is made from; reads the store, and of code only what the user has here."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa

from fimo.orchestrator.report.gallery import Gallery, Render
from fimo.orchestrator.report.report import Source, Written, write_report
from fimo.orchestrator.resolve.at_hand import HERE, Own, at_hand
from fimo.orchestrator.run import failures
from fimo.orchestrator.run.gather import current_tables
from fimo.orchestrator.spec.parquet import read_parquet
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Sweep, open_sweep
from fimo.orchestrator.tables import schemas
from fimo.workers.errors import StoreError, UsageError, WorkloadError

Say = Callable[[str], None]


def report_on(
    uri: str,
    to: Path,
    evals: Sequence[int] | None = None,
    step: int | None = None,
    count: int = 5,
    own: Own = HERE,
    render: str | Render | None = None,
    say: Say = lambda line: None,
    progress: Say = lambda line: None,
) -> tuple[Written, bool]:
    """Write the report of a sweep.

    Args:
        uri: STORE/NAME.
        evals, step, count: as ``write_report``.
        own: where the user has the sweep's code, and the module of ``render``.
        render: ``module:function``, or a function: shows an example in place of the workload's own ``render``.
        say: told what a reader should know; ``progress``: what is being done.

    Returns:
        What was written, and whether the sweep is complete.

    Raises:
        UsageError, StoreError: as ``write_report``, or there is no such sweep or function.
    """
    opened = open_sweep(uri)
    manifest = opened.read_manifest()
    function = _function(render, own.folder) if isinstance(render, str) else render
    tables, complete, warnings = _tables(opened, manifest, progress)
    source = Source(
        uri=opened.uri,
        manifest=manifest,
        tables=tables,
        complete=complete,
        warnings=warnings,
        proofs=opened.proofs(manifest.digest),
        ranking=_ranking(opened, manifest),
        gallery=_gallery(manifest, own, opened.store.uri, function, say),
        left_out=failures.read(opened, manifest).left_out,
    )
    if source.ranking is None and any(opened.store.list(keys.table(opened.name, "ranking"))):
        say(f"fimo: the ranking is of the sweep as it was, and not shown: `fimo rank {opened.uri}` makes it anew")
    return write_report(source, to, evals, step, count, progress), complete


def _tables(opened: Sweep, manifest: Manifest, progress: Say) -> tuple[dict[str, pa.Table], bool, list[str]]:
    """The tables, whether the sweep is complete, and what a reader must be told first."""
    lines: list[str] = []

    def note(line: str) -> None:
        (progress if line.startswith("reducing") else lines.append)(line)

    tables, complete = current_tables(opened, manifest, note)
    return tables, complete, list(dict.fromkeys(lines))


def _gallery(manifest: Manifest, own: Own, store: str, render: Render | None, say: Say) -> Gallery | None:
    try:
        return Gallery(at_hand(manifest, own, store), render)
    except WorkloadError as error:
        say(f"fimo: the examples are named, not shown: {error}")
        return None


def _ranking(opened: Sweep, manifest: Manifest) -> pa.Table | None:
    """``ranking.parquet`` of ``fimo rank``, if there is one and it is of this sweep as it is."""
    try:
        table = read_parquet(opened.store.get(keys.table(opened.name, "ranking")))
        about = json.loads((table.schema.metadata or {})[schemas.METADATA_KEY])
        seeds = manifest.spec.canonical()["seeds"]
        same = (about["digest"], about["spec"]["seeds"]) == (manifest.digest, seeds)
        own = same and table.schema.equals(schemas.RANKING)
    except (StoreError, KeyError, TypeError, ValueError, OSError, pa.ArrowException):
        return None
    return table if own else None


def ranking(opened: Sweep) -> pa.Table:
    """``ranking.parquet``; raises UsageError if there is none of the sweep as it is."""
    table = _ranking(opened, opened.read_manifest())
    if table is None:
        raise UsageError(f"there is no ranking of {opened.uri} as it is; `fimo rank {opened.uri}` makes one")
    return table


def _function(reference: str, folder: Path) -> Render:
    """``module:function`` of the user's, in a folder or installed."""
    module, _, name = reference.partition(":")
    if not module or not name.isidentifier():
        raise UsageError(f"--render is MODULE:FUNCTION, not '{reference}'")
    sys.path.insert(0, str(folder))
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--render: there is no function '{name}' in a module '{module}' in {folder}") from error
    except Exception as error:
        raise UsageError(f"--render: module '{module}' failed to import: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(folder))
    if not callable(function):
        raise UsageError(f"--render: '{reference}' is no function")
    render: Render = function
    return render
