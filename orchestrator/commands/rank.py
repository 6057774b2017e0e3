"""``fimo rank``: every training example ranked for every evaluation example, the top verified."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fimo.orchestrator.commands.app import (
    CodeOption,
    JsonOption,
    RayOption,
    SweepArgument,
    TrustOption,
    app,
    out,
    print_json,
    print_lines,
    talk,
)
from fimo.orchestrator.commands.run import stop_on_signal

if TYPE_CHECKING:
    from fimo.orchestrator.run.blocks import Named


@app.command()
def rank(
    sweep: SweepArgument,
    estimator: Annotated[
        str | None, typer.Option("--estimator", metavar="E", help="Default: the best scored one of the sweep.")
    ] = None,
    evals: Annotated[
        str | None, typer.Option("--evals", metavar="LIST", help="Evaluation examples, such as 0,3,5-9; default: all.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many of each sign are verified.")] = 10,
    step: Annotated[int | None, typer.Option("--step", help="The recorded step; default: the last.")] = None,
    cells: Annotated[
        int | None, typer.Option("--cells", min=0, help="To train for verifying at most; default: a fifth of all n.")
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", metavar="FILE", help="Write the ranking here too.")] = None,
    address: RayOption = None,
    code: CodeOption = Path(),
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Every training example ranked for every evaluation example, calibrated and verified by the gold standard."""
    from fimo.orchestrator.report.progress import ProgressReport
    from fimo.orchestrator.report.rank import ranked_json, ranked_lines, tables, top_table
    from fimo.orchestrator.resolve.at_hand import Own
    from fimo.orchestrator.resolve.resolved import resolve_again
    from fimo.orchestrator.run.pool import on_ray
    from fimo.orchestrator.run.ranking import rank as rank_all
    from fimo.orchestrator.run.tabled import about
    from fimo.orchestrator.sweep import keys
    from fimo.orchestrator.sweep.sweep import open_sweep
    from fimo.orchestrator.tables import ranked as files
    from fimo.workers.contract import names_of
    from fimo.workers.errors import StoreError

    opened = open_sweep(sweep)
    named, places = read_estimator(estimator), read_places(evals)
    resolved, stop = resolve_again(opened, Own(code, trust)), stop_on_signal()
    with ProgressReport(talk) as progress, on_ray(address, progress.say) as where:
        ranked = rank_all(resolved, opened, where, progress.listener, places, named, top, step, cells, stop)
    key, names = keys.table(opened.name, "ranking"), names_of(resolved.workload, resolved.manifest.train)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ranking.parquet"
        files.write(tables(ranked, names), file, {**about(resolved.manifest), "step": ranked.step})
        opened.store.put(key, file.read_bytes())
        if to is not None:
            try:
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(file.read_bytes())
            except OSError as error:
                raise StoreError(f"cannot write to {to}: {error.strerror or error}") from error
    uri = f"{opened.store.uri.rstrip('/')}/{key}"
    if as_json:
        print_json({**ranked_json(ranked), "ranking": uri})
        return
    print_lines(ranked_lines(ranked))
    out.print(top_table(next(tables(ranked, names)), ranked.step, ranked.k))
    print_lines([uri])


def read_estimator(text: str | None) -> Named | None:
    """An estimator by its name, or in the form of a spec's entry, {name: cg, damping: 0.1}; raises UsageError."""
    import yaml

    from fimo import estimators
    from fimo.orchestrator.spec.canonical import canonical
    from fimo.workers.errors import UsageError

    if text is None:
        return None
    try:
        entry = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--estimator is a name, or an entry as in a spec, not '{text}'") from error
    given = estimators.parse(entry)
    if len(given) != 1:
        raise UsageError("--estimator names one estimator; a list sweeps")
    return given[0].name, canonical(given[0].params())


def read_places(text: str | None) -> list[int] | None:
    """0,3,5-9 as numbers; raises UsageError."""
    from fimo.workers.errors import UsageError

    if text is None:
        return None
    places: list[int] = []
    for part in text.split(","):
        first, span, last = part.strip().partition("-")
        if not all(number.isascii() and number.isdigit() for number in (first, last if span else first)):
            raise UsageError(f"--evals is a list of evaluation examples such as 0,3,5-9, not '{text}'")
        places += range(int(first), int(last or first) + 1)
    return places
