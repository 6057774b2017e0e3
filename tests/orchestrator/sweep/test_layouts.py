"""Which way round a matrix lies: whatever is taken is what a loop over the definition takes, and no guess is made."""

from __future__ import annotations

import numpy as np
import pytest

from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.sweep.layouts import LAYOUTS, Wanted, lay_out
from fimo.workers.errors import UsageError

RNG = np.random.default_rng(0)
GROUPS = ((3,), (0, 4, 9), (7, 1))


def wanted(train=11, evals=5, groups=GROUPS) -> Wanted:
    return Wanted(tuple(NamedRemoval(i, str(i), tuple(sorted(g))) for i, g in enumerate(groups)), evals, train)


def truth(whole: np.ndarray, evals: int, groups=GROUPS) -> list[list[float]]:
    """Of a train × eval matrix."""
    return [[sum(whole[i, e] for i in group) for e in range(evals)] for group in groups]


@pytest.mark.parametrize("more", [0, 3])
@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_removals_values(layout: str, said: bool, more: int) -> None:
    whole = RNG.normal(size=(11, 5 + more))
    lies = whole if "train" in layout else np.array(truth(whole, 5 + more))
    values, told = lay_out(lies.T if layout.startswith("eval") else lies, "x", wanted(), layout if said else None)
    np.testing.assert_allclose(values, truth(whole, 5), rtol=1e-12)
    told = told or ""
    assert ("transposed" in told) == layout.startswith("eval")
    assert ("the 3 removals' rows taken, summed over" in told) == ("train" in layout)
    assert (f"the first 5 of {5 + more} evaluation examples" in told) == bool(more)
    assert bool(told) == (layout != "removal-eval" or bool(more))


@pytest.mark.parametrize(
    ("shape", "sweep", "ways"),
    [
        ((3, 3), wanted(evals=3), {"removal-eval", "eval-removal"}),
        ((11, 11), wanted(evals=11), {"train-eval", "eval-train"}),
        ((11, 11), wanted(evals=4), {"train-eval", "eval-train"}),
        ((3, 3), wanted(train=3, evals=3, groups=((0,), (2,), (1,))), set(LAYOUTS)),
        ((3, 5), wanted(train=3, evals=5, groups=((2,), (1,), (0,))), {"removal-eval", "train-eval"}),
        ((3, 5), wanted(train=5, evals=3, groups=((2,), (1,), (0,))), {"removal-eval", "eval-train"}),
    ],
)
def test_what_may_lie_two_ways_is_refused_until_it_is_said(shape, sweep, ways) -> None:
    matrix = RNG.normal(size=shape)
    with pytest.raises(UsageError, match="different numbers") as caught:
        lay_out(matrix, "x", sweep, None)
    assert set(str(caught.value).rpartition("--layout ")[2].split(" or ")) == ways
    read = [lay_out(matrix, "x", sweep, way)[0] for way in sorted(ways)]
    assert all(not np.array_equal(read[0], other) for other in read[1:])


def test_two_ways_of_one_meaning_are_no_question() -> None:
    """Every training example, in order: the removals' rows are the training examples' rows."""
    every = wanted(train=4, evals=2, groups=((0,), (1,), (2,), (3,)))
    matrix = RNG.normal(size=(4, 2))
    np.testing.assert_array_equal(lay_out(matrix, "x", every, None)[0], matrix)
    np.testing.assert_array_equal(lay_out(matrix.T, "x", every, None)[0], matrix)


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (11, 4), (10, 5), (2, 5), (5,), (1, 3, 5), (0, 0), ()])
def test_a_shape_that_fits_nothing_is_refused_with_what_would(shape) -> None:
    with pytest.raises(UsageError, match="3 removals × 5 evaluation examples, of 11 training examples") as caught:
        lay_out(np.zeros(shape), "x", wanted(), None)
    assert "\n" not in str(caught.value)


def test_what_is_said_must_fit_too() -> None:
    with pytest.raises(UsageError, match="does not fit as evals × training examples"):
        lay_out(np.zeros((3, 5)), "x", wanted(), "eval-train")
    with pytest.raises(UsageError, match="did you mean 'train-eval'"):
        lay_out(np.zeros((3, 5)), "x", wanted(), "train-evals")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("numbers", ["ascending", "shuffled"])
def test_rows_numbers_beside_their_scores_are_not_read_as_scores(layout: str, said: bool, numbers: str) -> None:
    whole = RNG.normal(size=(11, 5))
    lies = whole if "train" in layout else np.array(truth(whole, 5))
    counted = np.arange(len(lies)) * 2 + 1 if numbers == "ascending" else np.roll(np.arange(len(lies)), 1)
    lies = np.column_stack([counted, lies])
    with pytest.raises(UsageError, match="counts its rows"):
        lay_out(lies.T if layout.startswith("eval") else lies, "x", wanted(), layout if said else None)
