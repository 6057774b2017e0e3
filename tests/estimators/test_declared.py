"""An estimator and its declaration, which is read without torch: if they differed, blocks would be sought elsewhere."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from fimo.estimators import REGISTRY, parse
from fimo.estimators.declared import DECLARED, Declaration, declared

OWN = {name for name, of in vars(Declaration).items() if not name.startswith("__") or name == "__post_init__"}
"""What a declaration says: hyper-parameters by ``params``, and all that keys of estimates are made from."""


def test_every_estimator_is_declared_in_the_same_order() -> None:
    assert list(DECLARED) == list(REGISTRY)
    assert {"version", "evals_together", "follows_training", "follows_seeds", "runs", "params"} <= OWN


@pytest.mark.parametrize("name", REGISTRY)
def test_no_estimator_says_otherwise_than_its_declaration(name: str) -> None:
    kind, declaration = REGISTRY[name], DECLARED[name]
    assert issubclass(kind, declaration)
    for other in set(kind.__mro__) - set(declaration.__mro__) - {object}:
        # A class between the two would be heard by workers and not by who reads the store.
        told = {key for key in vars(other) if key in OWN or key in inspect.get_annotations(declaration)}
        assert not told - set(vars(declaration)), (name, other)
    assert [(f.name, f.type, f.default) for f in dataclasses.fields(kind)] == [
        (f.name, f.type, f.default) for f in dataclasses.fields(declaration)
    ]
    for key in OWN | {"name"}:
        assert getattr(kind, key) == getattr(declaration, key), key
    assert parse(name)[0].params() == declared(name, {}).params()
