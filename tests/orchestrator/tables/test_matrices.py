"""Tables as matrices: every number at its place, and what is missing is NaN, never 0."""

from __future__ import annotations

import numpy as np
import pytest

from fimo.orchestrator.tables import schemas
from fimo.orchestrator.tables.matrices import agreement_by_example, effects_at, estimate_at, known_ranks

STEPS = (4, 9)
MEAN = np.arange(24, dtype=np.float64).reshape(2, 3, 4) - 7.5


def attribution(missing=(), under=()):
    places = [(s, r, e) for s in range(2) for r in range(3) for e in range(4) if (s, r, e) not in missing]
    # In an order that is not the tables' own.
    places = [places[i] for i in np.random.default_rng(0).permutation(len(places))]
    s, r, e = map(np.array, zip(*places, strict=True))
    return schemas.table(
        schemas.ATTRIBUTION,
        removal=np.array([0, 2, 5])[r].astype(np.int32),
        eval=e.astype(np.int32),
        step=np.array(STEPS)[s].astype(np.int32),
        effect=MEAN[s, r, e],
        sem=MEAN[s, r, e] ** 2,
        p=np.full(len(s), 0.5),
        seeds=np.full(len(s), 3, dtype=np.int32),
        spread=np.zeros(len(s)),
        under_floor=[place in under for place in places],
    )


def test_every_number_stands_at_its_removal_and_example():
    found = effects_at(attribution(), 9)
    assert found.removals.tolist() == [0, 2, 5]
    assert (found.mean == MEAN[1]).all()
    assert (found.sem == MEAN[1] ** 2).all()
    assert found.floor.tolist() == [0, 0, 0, 0]


def test_what_is_missing_is_no_zero_and_its_removal_is_not_compared():
    found = effects_at(attribution(missing={(1, 1, 2)}), 9)
    assert np.isnan(found.mean[1, 2])
    assert np.isfinite(np.delete(found.mean.reshape(-1), 6)).all()
    assert found.complete.tolist() == [True, False, True]
    values = MEAN[1] * 2
    values[1] = 1e9
    assert agreement_by_example(found, values) == pytest.approx([1.0] * 4)


def test_an_example_under_the_floor_has_no_agreement():
    under = {(1, r, 3) for r in range(3)}
    found = effects_at(attribution(under=under), 9)
    assert found.floor[3] == np.abs(MEAN[1, :, 3]).max()
    agreement = agreement_by_example(found, MEAN[1])
    assert np.isnan(agreement[3])
    assert agreement[:3] == pytest.approx([1, 1, 1])


def test_estimates_of_a_step_or_of_every_step_and_of_removals_that_there_are():
    def estimates(step):
        return schemas.from_rows(
            schemas.ESTIMATES,
            [("mine", "{}", r, e, step, 10.0 * r + e) for r in (5, 0, 2, 7) for e in range(4)],
        )

    found = effects_at(attribution(), 9)
    wanted = [[0.0, 1, 2, 3], [20, 21, 22, 23], [50, 51, 52, 53]]
    assert estimate_at(estimates(9), ("mine", "{}"), found).tolist() == wanted
    assert estimate_at(estimates(None), ("mine", "{}"), found).tolist() == wanted
    assert estimate_at(estimates(4), ("mine", "{}"), found) is None
    assert estimate_at(estimates(9), ("other", "{}"), found) is None


def test_the_largest_value_is_the_first_and_none_has_no_rank():
    values = np.array([[1.0, np.nan], [3.0, 2.0], [-1.0, 5.0]])
    assert known_ranks(values).tolist() == [[2, 0], [1, 2], [3, 1]]
