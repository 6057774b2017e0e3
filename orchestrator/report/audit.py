"""What ``fimo audit`` prints, from what an audit found; text only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from fimo.orchestrator.report.show import SHOWN_SCORES, number, scored
from fimo.orchestrator.tables.audit import Audit
from fimo.orchestrator.tables.reliability import ADJUSTMENTS

EXTRAPOLATED = (1, 2, 5, 10, 20, 50, 100)


def audit_json(found: Audit) -> dict[str, Any]:
    """An audit as plain values."""
    return {
        "seeds": found.seeds,
        "removals": found.removals,
        "evals": found.evals,
        "notes": list(found.notes),
        "reliability": found.reliability.to_pylist(),
        "scores": found.scores.to_pylist(),
        "differences": found.differences.to_pylist(),
    }


def audit_lines(found: Audit) -> Iterator[str]:
    """What was audited, and how reliable it is, in lines."""
    yield f"{found.seeds} seeds × {found.removals} removals × {found.evals} evaluation examples"
    rows = found.reliability.to_pylist()
    for adjust in ADJUSTMENTS:
        [here] = [r for r in rows if r["measured"] and r["adjust"] == adjust]
        if here["reliability"] is None:
            continue
        significant = "" if here["significant"] is None else f"; {here['significant']:.0%} of pairs differ from zero"
        yield (
            f"adjust: {adjust}: reliability {here['reliability']:.3f}, ceiling of a cosine {here['ceiling']:.3f}, of "
            f"Spearman {number(here['spearman_lower'])} to {number(here['spearman_upper'])}{significant}"
        )
        others = {r["seeds"]: r["reliability"] for r in rows if not r["measured"] and r["adjust"] == adjust}
        told = ", ".join(f"{k}: {others[k]:.3f}" for k in EXTRAPOLATED if others.get(k) is not None)
        yield f"  extrapolated to other numbers of seeds: {told}"


def audit_tables(found: Audit) -> Iterator[Table]:
    """Scores against all seeds, and the differences between methods; nothing without methods."""
    rows = [r for r in found.scores.to_pylist() if r["seeds"] == found.seeds]
    if not rows:
        return
    for metric, adjust in SHOWN_SCORES:
        chosen = [r for r in rows if (r["metric"], r["adjust"]) == (metric, adjust)]
        table = Table(title=f"{metric}, adjust: {adjust}, {found.seeds} seeds", title_justify="left")
        for name in ("method", "score, 95%", "ceiling", "normalised", "evals"):
            table.add_column(name, justify="left" if name == "method" else "right", no_wrap=name.startswith("score"))
        for r in chosen:
            table.add_row(r["estimator"], scored(r), number(r["ceiling"]), number(r["normalised"]), str(r["evals"]))
        yield table
        pairs = [r for r in found.differences.to_pylist() if (r["metric"], r["adjust"]) == (metric, adjust)]
        if pairs:
            yield _differences(pairs)


def _differences(pairs: list[dict[str, Any]]) -> Table:
    table = Table(title="differences between methods", title_justify="left")
    for name in ("method", "less method", "difference, 95%", ""):
        table.add_column(name, justify="right" if name.startswith("difference") else "left")
    for r in pairs:
        verdict = "" if r["noise"] is None else "within the noise" if r["noise"] else "more than noise"
        table.add_row(r["estimator"], r["other"], scored({**r, "score": r["difference"]}), verdict)
    return table
