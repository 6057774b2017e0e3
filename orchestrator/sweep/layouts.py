"""Which way round another library's matrix lies, and of what its rows are: told by its shape, or by its user.

Invariants: a matrix that could be read in two ways with different numbers is refused. What was done to it is told. It
is read by place: rows or columns that a file numbers otherwise than they lie are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.workers.errors import UsageError, nearest

Matrix = NDArray[np.float64]

LAYOUTS = {
    "removal-eval": "removals × evals",
    "eval-removal": "evals × removals",
    "train-eval": "training examples × evals",
    "eval-train": "evals × training examples",
}
"""What may be asked for -> how it is called."""


@dataclass(frozen=True)
class Wanted:
    """What a sweep needs of a matrix: its removals, and the numbers of its evaluation and of all training examples."""

    removals: Sequence[NamedRemoval]
    evals: int
    train: int

    @property
    def shape(self) -> tuple[int, int]:
        """(removals, evals)."""
        return len(self.removals), self.evals


def check_layout(layout: str | None) -> None:
    """Refuse a layout that is none (UsageError)."""
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"--layout '{layout}' is none{nearest(layout, LAYOUTS)}")


def refuse_disorder(labels: Sequence[object], what: str, name: str, known: Sequence[int] = ()) -> None:
    """Refuse numbers of rows or columns that do not ascend (UsageError); names that are no numbers say nothing.

    Args:
        what: rows or columns; ``name``: of the file.
        known: numbers that are in order as they are: the removals' examples.
    """
    written = [str(label) for label in labels]
    if not all(label.isdecimal() for label in written):
        return
    counted = [int(label) for label in written]
    if counted != list(known) and any(after <= before for before, after in pairwise(counted)):
        shown = ", ".join(written[:6]) + (" …" if len(written) > 6 else "")
        raise UsageError(
            f"'{name}' numbers its {what} {shown}, but a matrix is read by place: put them in order, or give columns "
            "removal, eval and value"
        )


def lay_out(matrix: Matrix, name: str, wanted: Wanted, layout: str | None) -> tuple[Matrix, str | None]:
    """A matrix as (removals, evals), and how it was read, in a line; None if it was so already.

    Of a matrix of all training examples the removals' rows are taken, summed over each removal's examples, since that
    is what an estimate of a group is. More evaluation examples than the sweep has are cut to the first of them.

    Args:
        name: of the file, for errors.
        layout: one of ``LAYOUTS``; None = whichever fits the shape.

    Raises:
        UsageError: no layout fits the shape, or several that give different numbers.
    """
    check_layout(layout)
    if matrix.ndim != 2:
        raise UsageError(f"'{name}' holds an array of shape {matrix.shape}; scores are a matrix: {_needed(wanted)}")
    fitting = [one for one in ([layout] if layout else LAYOUTS) if _fits(matrix.shape, one, wanted)]
    if not fitting:
        asked = f" as {LAYOUTS[layout]}" if layout else ""
        raise UsageError(
            f"'{name}' holds a matrix of shape {matrix.shape}, which does not fit{asked}: {_needed(wanted)}"
        )
    for one in fitting:
        _refuse_index(_upright(matrix, one), name, wanted)
    read = {one: _read(matrix, one, wanted) for one in fitting}
    first = read[fitting[0]]
    if any(not np.array_equal(first, other, equal_nan=True) for other in read.values()):
        ways = " or ".join(LAYOUTS[one] for one in fitting)
        raise UsageError(
            f"'{name}' of shape {matrix.shape} may be {ways}, which are different numbers: say which it is, "
            f"--layout {' or '.join(fitting)}"
        )
    return first, _told(matrix, fitting[0], wanted)


def _needed(wanted: Wanted) -> str:
    removals, evals = wanted.shape
    return (
        f"the sweep has {removals} removals × {evals} evaluation examples, of {wanted.train} training examples "
        "(either way round)"
    )


def _upright(matrix: Matrix, layout: str) -> Matrix:
    return matrix.T if layout.startswith("eval-") else matrix


def _refuse_index(upright: Matrix, name: str, wanted: Wanted) -> None:
    """Refuse rows' numbers beside their scores, which would be read as those of the first evaluation example."""
    rows, evals = upright.shape
    first = upright[:, 0] if evals > wanted.evals else np.zeros(0)
    if rows < 2 or not len(first) or not np.array_equal(first, np.round(first)):
        return
    examples = [i for removal in wanted.removals for i in removal.indices]
    counts = {tuple(np.sort(numbers)) for numbers in (np.arange(rows), np.arange(1, rows + 1), np.array(examples))}
    if bool((np.diff(first) > 0).all()) or tuple(np.sort(first)) in counts:
        raise UsageError(
            f"'{name}' of shape {upright.shape} counts its rows before the scores of {wanted.evals} evaluation "
            "examples, as an index does: leave that out"
        )


def _fits(shape: tuple[int, ...], layout: str, wanted: Wanted) -> bool:
    rows, evals = shape[::-1] if layout.startswith("eval-") else shape
    return rows == (wanted.train if "train" in layout else len(wanted.removals)) and evals >= wanted.evals


def _read(matrix: Matrix, layout: str, wanted: Wanted) -> Matrix:
    values = _upright(matrix, layout)[:, : wanted.evals]
    if "train" in layout:
        values = np.stack([values[list(removal.indices)].sum(axis=0) for removal in wanted.removals])
    return np.ascontiguousarray(values)


def _told(matrix: Matrix, layout: str, wanted: Wanted) -> str | None:
    done = ["transposed"] if layout.startswith("eval-") else []
    if "train" in layout:
        done.append(f"the {len(wanted.removals)} removals' rows taken")
        if any(len(removal.indices) > 1 for removal in wanted.removals):
            done.append("summed over each removal's examples")
    if (evals := _upright(matrix, layout).shape[1]) > wanted.evals:
        done.append(f"the first {wanted.evals} of {evals} evaluation examples taken")
    return f"read as {LAYOUTS[layout]}: {', '.join(done)}" if done else None
