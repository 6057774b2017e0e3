"""``fimo import-scores``: another library's matrix, scored beside fimo's estimators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fimo.orchestrator.commands.app import JsonOption, SweepArgument, app, out, print_json, tell

if TYPE_CHECKING:
    from rich.table import Table


@app.command("import-scores")
def import_scores(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A matrix: Parquet, npy, safetensors or CSV.")],
    sweep: SweepArgument,
    name: Annotated[str, typer.Option("--name", help="How the scores are called in tables.")],
    negate: Annotated[bool, typer.Option("--negate", help="The library counts a helpful example as negative.")] = False,
    layout: Annotated[
        str | None,
        typer.Option(
            "--layout",
            help="removal-eval, eval-removal, train-eval or eval-train; default: whichever alone fits the shape.",
            autocompletion=lambda: ["removal-eval", "eval-removal", "train-eval", "eval-train"],
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score another library's matrix beside fimo's; positive must mean that removing the example raises g."""
    values, tables = take_scores(file, sweep, name, negate, layout, tell)
    if as_json:
        print_json(values)
        return
    for table in tables:
        out.print(table)
    tell(f"{name}: kept in {values['sweep']}")


def take_scores(
    file: Path,
    uri: str,
    name: str,
    negate: bool,
    layout: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], list[Table]]:
    """Take a matrix into a sweep and score it.

    Args:
        layout: which way round it lies; None = told by its shape.
        say: told how it was read, if not as it lies.

    Returns:
        Plain values (sweep, name, negated, tables, scores), and the score tables; none if there is nothing to
        score against yet.

    Raises:
        UsageError: no such sweep, the file cannot be read, or its matrix does not fit.
    """
    from fimo.orchestrator.report.scores import score_tables
    from fimo.orchestrator.run.gather import gather
    from fimo.orchestrator.run.written import write_tables
    from fimo.orchestrator.sweep import imported
    from fimo.orchestrator.sweep.sweep import open_sweep
    from fimo.workers.errors import UsageError

    sweep = open_sweep(uri)
    manifest = sweep.read_manifest()
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(f"'{file}' cannot be read: {error.strerror or error}") from error
    imported.import_scores(sweep, manifest, data, str(file), name, negate, layout, say)
    gathered = gather(sweep, manifest)
    written = write_tables(sweep, gathered.tables, gathered.stamp, gathered.warnings)
    scores = [r for r in gathered.tables["scores"].to_pylist() if r["estimator"] == name]
    values = {"sweep": sweep.uri, "name": name, "negated": negate, "tables": written, "scores": scores}
    weight = manifest.spec.further_training.removal_weight
    return values, score_tables(
        gathered.tables["scores"], gathered.tables["costs"], weight=weight, width=out.width, encoding=out.encoding
    )
