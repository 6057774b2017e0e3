"""A truth value inside ``vmap`` is given if all replicas share it, and refused if they do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

from fimo.workers.further_training import further_train
from fimo.workers.shard import run_shard
from fimo.workers.stacking.stacked import Stacked
from tests.workers.problems import classification, make, settings
from tests.workers.test_against_definition import hold


def sign(x: Tensor) -> Tensor:
    return x + 1 if (x > 0).all() else -x


def test_agreement_is_used_and_disagreement_refused() -> None:
    with Stacked():
        assert vmap(sign)(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist() == [[2, 3], [4, 5]]
        assert vmap(sign)(torch.tensor([[-1.0], [-2.0]])).tolist() == [[1], [2]]
        with pytest.raises(RuntimeError, match="replicas decide differently"):
            vmap(sign)(torch.tensor([[1.0], [-1.0]]))
        assert bool(torch.tensor([3.0])), "tensors outside vmap keep their truth value"


class Decides(nn.Module):
    """Computes otherwise if a padding-like mask of the batch is all True."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(hidden if (x[:, 0] < 1.0).all() else 2 * hidden)


def test_replicas_whose_batches_disagree_are_trained_one_at_a_time() -> None:
    chosen = settings(removal_mode="drop")
    start = make(classification(model=Decides()), chosen)
    with pytest.raises(RuntimeError, match="replicas decide differently"):
        further_train(start, [(i,) for i in range(23)], 0)
    got = run_shard(start, [(i,) for i in range(22)], 0, replicas=23)
    assert got.replicas == 1
    alone = run_shard(start, [(i,) for i in range(22)], 0, replicas=1)
    assert torch.equal(got.deltas[:-1], alone.deltas[:-1])
    hold(classification(model=Decides()), chosen, [(3,)])
