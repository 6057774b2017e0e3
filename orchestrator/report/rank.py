"""What ``fimo rank`` prints: the chosen estimator, how well it does, and the top of an evaluation example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from rich.table import Table

from fimo.orchestrator.report.show import label
from fimo.orchestrator.run.ranking import Ranked, of_eval
from fimo.orchestrator.tables.ranked import ranked_table

SHOWN = 5


def tables(ranked: Ranked, names: Mapping[str, Sequence[str]]) -> Iterator[pa.Table]:
    """``ranking.parquet``, an evaluation example after another; ``names`` as for ``ranked_table``."""
    n, known = ranked.values.shape[1], ranked.known
    seeds = np.full(n, np.nan)
    for index, count in known.seeds.items():
        seeds[index] = count
    for place, number in enumerate(ranked.evals):
        estimate = np.array(ranked.values[place])
        effect, low, high = (x[:, 0] for x in ranked.calibration.at(place).effects(estimate[:, None]))
        verified, sem = (of_eval(of, number, n) for of in (known.effect, known.sem))
        yield ranked_table(number, estimate, effect, low, high, verified, sem, seeds, names)


def ranked_json(ranked: Ranked) -> dict[str, Any]:
    """What a program may read of a ranking beside its table."""
    choice = ranked.choice
    return {
        "estimator": ranked.estimator[0],
        "params": ranked.estimator[1],
        "step": ranked.step,
        "evals": len(ranked.evals),
        "train": ranked.values.shape[1],
        "score": None if choice is None else choice.score,
        "normalised": None if choice is None else choice.normalised,
        "score_of_other_examples": None if choice is None else not choice.same,
        "coverage": None if ranked.covered is None else ranked.covered[0],
        "coverage_sem": None if ranked.covered is None else ranked.covered[1],
        "level": ranked.calibration.level,
        "calibrated_on": ranked.calibration.removals,
        "cells_trained": ranked.trained,
        "cells_brute_force": ranked.brute,
        "unverified": ranked.left,
    }


def ranked_lines(ranked: Ranked) -> list[str]:
    """The summary for people."""
    choice, lines, n = ranked.choice, list[str](), ranked.values.shape[1]
    name = label(*ranked.estimator)
    if choice is None:
        lines.append(f"{n} training examples ranked by {name} at step {ranked.step}")
    else:
        on = "the same, since there are no others" if choice.same else "the other half"
        share = "" if choice.normalised is None else f" ({choice.normalised:.2f} of the highest possible)"
        lines.append(
            f"{n} training examples ranked by {name} at step {ranked.step}: the best on half of the "
            f"evaluation examples, with a cosine of {choice.score:.3f}{share} on {on}"
        )
    if ranked.covered is not None:
        lines.append(
            f"intervals at {ranked.calibration.level:.0%} hold {ranked.covered[0]:.1%} ± {ranked.covered[1]:.1%} of "
            f"{ranked.calibration.removals} known effects that had no part in them"
        )
    if ranked.calibration.line is not None:
        lines.append(ranked.calibration.line)
    spent = f"{ranked.trained} cells trained for it, brute force takes {ranked.brute}"
    if not ranked.left:
        lines.append(f"the top {ranked.k} of both signs are verified: {spent}")
    else:
        places = 2 * ranked.k * len(ranked.evals)
        lines.append(
            f"{ranked.left} of the {places} places in the top {ranked.k} of both signs are not verified (? below): "
            f"{spent}; --cells allows more, fewer --evals or a smaller --top need fewer"
        )
    return lines


def top_table(table: pa.Table, step: int, k: int) -> Table:
    """The ``SHOWN`` most helpful and most harmful training examples of one evaluation example, effect ± SEM."""
    rows = table.to_pylist()
    count = min(SHOWN, k, len(rows) // 2)
    shown = Table(
        title=f"evaluation example {rows[0]['eval']}, step {step}: most helpful and most harmful training examples",
        title_justify="left",
    )
    shown.add_column("rank", justify="right", no_wrap=True)
    shown.add_column("example", justify="right", overflow="fold")
    for column in ("effect of removing it", "p"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows[:count] + rows[len(rows) - count :]:
        effect = row["effect"] if row["verified"] is None else row["verified"]
        told = f"{effect:+.3e}" + (f" ± {row['sem']:.1e}" if row["sem"] is not None else "")
        p = f"{row['p']:.2g}" if row["p"] is not None else ""
        named = " ".join(filter(None, (str(row["index"]), row["id"], row["label"])))
        shown.add_row(str(row["rank"]), named, told + ("" if row["verified"] is not None else " ?"), p)
    return shown
