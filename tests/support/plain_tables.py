"""The arithmetic of the tables as it is plainly written, in the order in which numpy adds; for tests of the fast one.

What stands here was the code itself until it was made fast.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import rankdata

from fimo.orchestrator.tables import beside, compare, matrices, moments, ordering, rank_ceilings
from fimo.orchestrator.tables.agreement import cosine, norm


def ranks(a):
    return rankdata(a, axis=0) - (len(a) + 1) / 2


class Beside:
    def __init__(self, aligned, steps):
        every = [list(places) for places, _ in aligned]
        self.places = [places for n, places in enumerate(every) if places not in every[:n]]
        self.groups = [[n for n, own in enumerate(every) if own == places] for places in self.places]
        self.steps, self.values = steps, [[aligned[n][1] for n in numbers] for numbers in self.groups]

    def _groups(self):
        for places, values in zip(self.places, self.values, strict=True):
            yield slice(None) if len(places) == self.steps else places, values

    def spearman(self, effects):
        ranked = ranks(effects)
        return [np.stack([cosine(ranked[:, at], ranks(v)) for v in values]) for at, values in self._groups()]

    def cosine(self, gold, norms):
        return [np.stack([cosine(gold[:, at], v, norms[at], norm(v)) for v in values]) for at, values in self._groups()]


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
    patch.setattr(moments.Welford, "add", add_moments)
    patch.setattr(moments.Comoment, "add", add_comoments)
    assert beside.Beside is not Beside
