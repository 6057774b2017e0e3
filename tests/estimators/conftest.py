from __future__ import annotations

import pytest

from fimo.estimators.operators import gradients


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least three blocks and a ragged last one in every test: 27 training examples in blocks of 10."""
    monkeypatch.setattr(gradients, "BLOCK", 10)
