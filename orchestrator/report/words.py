"""What a reader of a report must know first, in plain words: what was asked, how sure it is, what helps; text only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from fimo.orchestrator.report.cards import Card, Hand
from fimo.orchestrator.report.figures.scores import last_scores
from fimo.orchestrator.report.show import labels
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.tables.matrices import numbers, own_rows, where
from fimo.orchestrator.tables.sanity import exploded
from fimo.orchestrator.tables.top import Effect, Top

ENOUGH = 0.95
"""Of reliability: what a reader is told to aim at."""
HOW_SURE = ((ENOUGH, "very sure"), (0.8, "fairly sure"), (0.5, "unsure"), (-math.inf, "very unsure"))
SURE = 3.0
"""Standard errors at which an effect among dozens can be told from zero, about."""

MODES = {
    "drop": "leaving it out of the data, so that later batches slide forward",
    "mask": "leaving it out of its own batch",
    "reweight": "subtracting its share of the loss from every step",
}


def asked(manifest: Manifest, step: int) -> str:
    """What was done, in two sentences."""
    spec, training = manifest.spec, manifest.spec.further_training.settings()
    groups = any(len(r.indices) > 1 for r in manifest.removals)
    kind = "groups of training examples" if groups else "training examples"
    length = f"{training.epochs} epochs" if training.epochs is not None else f"{training.steps} steps"
    weight = "" if training.removal_weight == 1 else f", weighted {training.removal_weight:g} times"
    return (
        f"How does the final model depend on single {kind}? It was trained further from where it stands "
        f"({length} of {training.optimizer.name} at a learning rate of {training.optimizer.lr:g}, in batches of "
        f"{training.batch_size}), on all {manifest.train:,} training examples and again without each of "
        f"{_count(len(manifest.removals), 'removal')} ({MODES[str(training.removal_mode)]}{weight}), with the same "
        f"randomness, {_count(spec.seeds.count, 'time')}. The mean difference on each of "
        f"{_count(manifest.evals, 'evaluation example')} is the effect, here after step {step}. "
        "Positive means that g, the loss if the workload names no other, rises when the example is removed: it helped."
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def sure(tables: Mapping[str, pa.Table], step: int) -> str:
    """How far the effects at a step can be trusted."""
    row = next((r for r in own_rows(tables["reliability"]) if r["step"] == step), None)
    if row is None:
        return "Nothing is trained yet, so that nothing is known."
    if row["seeds"] < 2:
        return "There is one seed, so that nobody can say how sure these effects are. Two or more tell."
    if row["reliability"] is None:
        return f"How far the mean over {row['seeds']} seeds can be trusted is not known at step {step}."
    share = row["reliability"]
    word = (
        "very sure"
        if share >= ENOUGH
        else "fairly sure"
        if share >= 0.8
        else "unsure"
        if share >= 0.5
        else "very unsure"
    )
    told = (
        ""
        if row["significant"] is None
        else f" Of single effects, {row['significant']:.0%} can be told from zero (a twentieth of those falsely)."
    )
    return (
        f"As a whole the effects are {word}: of what is seen in the mean over {row['seeds']} seeds, {share:.0%} is "
        f"signal and the rest is the noise of the seeds (reliability {share:.2f}).{told}"
    )


def surer(tables: Mapping[str, pa.Table], step: int) -> str:
    """What to do to be surer at a step."""
    if is_exploded(tables["training_only"], step):
        return "More seeds would not help: training has left the final model's neighbourhood. Lower the learning rate."
    own = next((r for r in own_rows(tables["reliability"]) if r["step"] == step), None)
    if own is None:
        return "Run the sweep."
    seeds = own["seeds"]
    how = "only the new seeds are computed if `seeds` is raised in the spec and it is run again"
    if own["reliability"] is None:
        return f"More seeds: {how}."
    if own["reliability"] >= ENOUGH:
        return f"For narrower intervals of single effects, more seeds: {4 * seeds} seeds halve them; {how}."
    rows = where(where(tables["reliability"], adjust="baseline"), step=step).to_pylist()
    reaching = [r["seeds"] for r in rows if r["reliability"] is not None and r["reliability"] >= ENOUGH]
    if not reaching:
        most = max(r["seeds"] for r in rows)
        return (
            f"Even {most} seeds would not reach a reliability of {ENOUGH:g} here. Look at fewer steps, or at another "
            "removal mode or groups; `fimo amount` says which amounts can be trusted."
        )
    return f"About {min(reaching)} seeds would reach a reliability of {ENOUGH:g}; {how}."


def is_exploded(training_only: pa.Table, step: int) -> bool:
    """Whether training on everything has moved g beyond reason (``tables.sanity``), as far as the table tells."""
    rows = where(training_only, step=step)
    if not len(rows):
        return False
    scale = (
        float(np.sqrt(np.nanmean(np.square(numbers(rows, "at_final"))))) if rows["at_final"].null_count == 0 else 0.0
    )
    return bool(exploded(np.nan_to_num(numbers(rows, "delta"), nan=np.inf)[None], scale)[0])


def covered(manifest: Manifest, ranked: bool) -> str:
    """How much of the training data has been looked at, and how to look at the rest."""
    indices = {index for removal in manifest.removals for index in removal.indices}
    if len(indices) >= manifest.train:
        return ""
    looked = f"{len(indices):,} of the {manifest.train:,} training examples were removed"
    if ranked:
        return f"{looked}; the others are estimated, calibrated on those (`fimo rank`)."
    return f"{looked}: of the others nothing is said here. `fimo rank` ranks all of them."


def closest(tables: Mapping[str, pa.Table], step: int) -> str:
    """Which estimator comes closest at a step, and how close that is to the best possible."""
    rows = [r for r in last_scores(tables["scores"], step).to_pylist() if r["score"] is not None]
    if not rows:
        return "No estimator has a score at this step."
    names = labels((r["estimator"], r["params"]) for r in rows)
    rows.sort(key=lambda r: -float(r["score"]))
    best = rows[0]
    told = (
        f"Of {_count(len(rows), 'estimator')}, {_scored(best, names)} comes closest"
        if len(rows) > 1
        else (f"The estimator {_scored(best, names)} was compared")
    )
    after = f", then {_scored(rows[1], names)}" if len(rows) > 1 else ""
    ceiling = "" if not best["ceiling"] else f" The highest cosine that any can reach is {best['ceiling']:.2f}."
    return f"{told}{after}.{ceiling}"


def _scored(row: Mapping[str, Any], names: Mapping[tuple[str, str], str]) -> str:
    interval = "" if row["low"] is None else f", {row['low']:.2f} to {row['high']:.2f}"
    return f"{names[row['estimator'], row['params']]} (cosine {row['score']:.2f}{interval})"


def about_example(top: Top, hand: Hand, count: int) -> list[str]:
    """Of one evaluation example, in sentences: g, which removals matter most, how sure that is, and what would help."""
    lines = []
    moved = "" if top.training_only is None else f"; training on everything moves it by {top.training_only:+.3g}"
    if top.at_final is not None:
        lines.append(f"At the final model g is {top.at_final:.4g}{moved}.")
    named = ", ".join(f"{card.name} ({_kind(card)})" for card in hand.largest(count))
    lines.append(f"Largest in size: {named or 'none'}.")
    if top.seeds < 2:
        return [*lines, "There is one seed, so that no effect can be told from zero."]
    told = sum(bool(e.told) for e in top.effects)
    lines.append(f"Of {_count(len(top.effects), 'removal')} of the sweep, {told} can be told from zero.")
    most = sorted(top.effects, key=lambda e: -abs(e.effect))[:count]
    needed = seeds_needed(top, most)
    if needed is not None and needed > top.seeds:
        lines.append(
            f"For all of the {len(most)} largest of them to be told from zero it would take about {needed:,} seeds in "
            f"place of {top.seeds}, if they stay as large."
        )
    return lines


def _kind(card: Card) -> str:
    kind = "helpful" if card.helpful else "harmful"
    if card.how == "measured":
        return kind + ("" if card.told else ", not told from zero")
    return f"{kind}, {card.how}"


def seeds_needed(top: Top, effects: Sequence[Effect]) -> int | None:
    """Seeds at which every one of some effects would be ``SURE`` standard errors from zero; None if it is not known.

    Standard errors fall as the square root of the seeds.
    """
    needed = 0.0
    for effect in effects:
        if effect.sem is None or top.seeds < 2 or not effect.effect:
            return None
        needed = max(needed, top.seeds * (SURE * effect.sem / abs(effect.effect)) ** 2)
    return None if not effects or needed > 1e6 else max(top.seeds if needed <= top.seeds else 0, math.ceil(needed))
