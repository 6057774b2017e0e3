"""The arithmetic of the tables as it is plainly written, in the order in which numpy adds; for tests of the fast one.

What stands here was the code itself until it was made fast.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import rankdata

from fimo.orchestrator.tables import beside, compare, matrices, ordering, rank_ceilings, reduce
from fimo.orchestrator.tables.agreement import cosine, norm


def ranks(a):
    return rankdata(a, axis=0) - (len(a) + 1) / 2


class Beside:
    def __init__(self, aligned, steps):
        self.places = [list(places) for places, _ in aligned]
        self.steps, self.values = steps, [values for _, values in aligned]

    def _at(self, number):
        return slice(None) if len(self.places[number]) == self.steps else self.places[number]

    def spearman(self, effects):
        ranked = ranks(effects)
        return [cosine(ranked[:, self._at(n)], ranks(v)) for n, v in enumerate(self.values)]

    def cosine(self, gold, norms):
        at = map(self._at, range(len(self.values)))
        return [cosine(gold[:, a], v, norms[a], norm(v)) for a, v in zip(at, self.values, strict=True)]


def add_moments(self, values, present=None):
    present = np.isfinite(values).all(axis=-1)
    self.count += present
    where = np.expand_dims(present, -1)
    delta = np.where(where, values - self.mean, 0.0)
    self.mean += delta / np.maximum(self.count, 1)[..., None]
    self.m2 += np.where(where, delta * (values - self.mean), 0.0)


def add_comoments(self, values, baseline, after, finite=None):
    present = np.isfinite(values).all(axis=-1) & np.isfinite(baseline).all(axis=-1)
    self._count += present
    offset = np.where(present[..., None], baseline - self._mean, 0.0)
    self._mean += offset / np.maximum(self._count, 1)[..., None]
    self._sum += offset * np.where(present[..., None], values - after.mean, 0.0)


def plainly(patch: pytest.MonkeyPatch) -> None:
    """Have the tables computed by what stands here."""
    for module in (compare, matrices, rank_ceilings, ordering):
        patch.setattr(module, "ranks", ranks)
    patch.setattr("fimo.orchestrator.tables.score.Beside", Beside)
    patch.setattr(reduce.Welford, "add", add_moments)
    patch.setattr(reduce.Comoment, "add", add_comoments)
    assert beside.Beside is not Beside
