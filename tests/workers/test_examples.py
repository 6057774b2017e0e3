"""Examples are fetched by index from whatever the workload keeps them in."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch

from fimo.workers.errors import WorkloadError
from fimo.workers.examples import Examples, as_batch
from fimo.workers.further_training import further_train
from fimo.workers.workload import Workload
from tests.workers.problems import Sentences, make, settings
from tests.workers.test_against_definition import hold


def test_tensors_by_index_in_order_and_dtype() -> None:
    source = {"x": torch.arange(12.0).view(6, 2), "label": torch.arange(6)}
    examples = Examples(source, dtype=torch.float64)
    batch = examples.batch([4, 1])
    assert batch["x"].tolist() == [[8, 9], [2, 3]]
    assert batch["x"].dtype is torch.float64
    assert batch["label"].dtype is torch.int64, "integers keep their dtype"
    assert examples.batch(torch.tensor([[0, 1], [2, 3], [4, 5]]))["x"].shape == (3, 2, 2)
    assert [block for block, _ in examples.batches(4)] == [[0, 1, 2, 3], [4, 5]]


def test_a_dataset_with_its_own_collate_and_one_given() -> None:
    own = Examples(Sentences(9, 1)).batch([2, 5, 0])
    assert own["tokens"].shape[0] == 3
    given = Examples(Sentences(9, 1), collate=lambda items: {"count": torch.tensor([len(t) for t, _ in items])})
    assert given.batch([2, 5]).keys() == {"count"}


def test_a_list_of_dicts_is_a_dataset_too() -> None:
    rows = [{"x": torch.tensor([float(i), 1.0]), "y": float(i)} for i in range(5)]
    batch = Examples(rows).batch([3, 1])
    assert batch["x"].tolist() == [[3, 1], [1, 1]]
    assert batch["y"].tolist() == [3, 1]


def test_mappings_that_torch_does_not_know_become_dicts() -> None:
    batch = as_batch(UserDict(x=torch.ones(1), more=UserDict(y=torch.zeros(1))))
    assert type(batch) is dict
    assert type(batch["more"]) is dict


def test_unequal_lengths_and_foreign_kinds_are_refused() -> None:
    with pytest.raises(WorkloadError, match="equally long"):
        Examples({"x": torch.ones(3), "y": torch.ones(2)})
    with pytest.raises(WorkloadError, match="not generator"):
        Examples(i for i in range(3))
    with pytest.raises(WorkloadError, match="no example"):
        Examples({})
    with pytest.raises(WorkloadError, match="no example"):
        Examples({"x": torch.ones(0, 2)})


def test_batches_that_are_tuples_train_too() -> None:
    torch.manual_seed(0)
    rows = [(torch.randn(4), torch.randn(())) for _ in range(30)]

    def outputs(model: torch.nn.Module, batch) -> torch.Tensor:
        x = batch["x"] if isinstance(batch, dict) else batch[0]
        return model(x).squeeze(-1)

    def loss(out: torch.Tensor, batch) -> torch.Tensor:
        return (out - (batch["y"] if isinstance(batch, dict) else batch[1])) ** 2

    model = torch.nn.Linear(4, 1)
    tuples = Workload(model, rows[:23], rows[23:], outputs, loss)
    as_dicts = [{"x": x, "y": y} for x, y in rows]
    chosen = settings(removal_mode="drop")
    dicts = Workload(model, as_dicts[:23], as_dicts[23:], outputs, loss)
    hold(dicts, chosen, [(), (3,)])
    one, other = (further_train(make(w, chosen), [(), (3,)], 0).deltas for w in (tuples, dicts))
    assert torch.equal(one, other)
