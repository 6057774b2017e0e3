"""How far a sweep can be trusted, in a sentence; text only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def trust_lines(reliability: Iterable[Mapping[str, Any]]) -> list[str]:
    """How far a sweep's own seeds can be trusted, in a sentence: from the rows of ``reliability.parquet``."""
    own = [r for r in reliability if r["measured"] and r["adjust"] == "baseline"]
    rows = sorted((r for r in own if r["reliability"] is not None), key=lambda r: int(r["step"]))
    if not rows:
        one = own and all(r["seeds"] == 1 for r in own)
        return ["one seed: how far its effects can be trusted is not known; two or more tell"] if one else []
    shown = [rows[0], rows[-1]] if len(rows) > 1 else rows
    told = ", ".join(f"{r['reliability']:.2f} at step {r['step']}" for r in shown)
    pairs = " and ".join("–" if r["significant"] is None else f"{r['significant']:.0%}" for r in shown)
    worst = min(rows, key=lambda r: float(r["reliability"]))
    least = "" if worst in shown else f" (least {worst['reliability']:.2f} at step {worst['step']})"
    return [
        f"the mean over {rows[0]['seeds']} seeds has a reliability of {told}{least}; {pairs} of the effects can be "
        "told from zero"
    ]
