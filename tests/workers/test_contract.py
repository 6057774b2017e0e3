"""Mistakes in a workload's data and functions: each is one line that names the key and the mend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fimo.workers.contract import check_contract, leaves_of, names_of
from fimo.workers.errors import DivergedError, FimoError, WorkloadError
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.workload import Workload

N = 11


def tensors(n: int = N) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return {"x": torch.randn(n, 3, generator=generator), "y": torch.randint(0, 2, (n,), generator=generator)}


def workload(**changes: Any) -> Workload:
    plain = Workload(
        model=nn.Linear(3, 2),
        train=tensors(),
        evals=tensors(5),
        outputs=lambda model, batch: model(batch["x"]),
        loss=lambda out, batch: nn.functional.cross_entropy(out, batch["y"], reduction="none"),
    )
    return replace(plain, **changes)


def checked(of: Workload) -> None:
    train, evals = (Examples(source, of.collate) for source in (of.train, of.evals))
    check_contract(FunctionalModel(of), train, evals)


def refused(of: Workload, kind: type[FimoError] = WorkloadError) -> str:
    with pytest.raises(kind) as error:
        checked(of)
    line = str(error.value)
    assert "\n" not in line
    return line


@dataclass
class Rows:
    """A dataset whose items are what ``item`` makes of a row."""

    item: Callable[[dict[str, Tensor], int], Any]
    n: int = N

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        return self.item({key: value[index] for key, value in tensors(self.n).items()}, index)


def test_a_workload_that_keeps_the_contract_passes() -> None:
    checked(workload())
    checked(workload(train=Rows(lambda row, _: row), evals=Rows(lambda row, _: row, 5)))


def test_a_string_in_a_batch_is_named() -> None:
    line = refused(workload(train=Rows(lambda row, i: {**row, "name": f"row {i}"})))
    assert "training batch's 'name' holds a list of str, not a tensor" in line
    assert "labels" in line


def test_lists_instead_of_tensors_are_named() -> None:
    line = refused(workload(train={**tensors(), "y": tensors()["y"].tolist()}))
    assert "'y' is a list of int, not a tensor" in line
    collate = {"collate": lambda items: {"x": [i["x"].tolist() for i in items], "y": torch.tensor([0] * len(items))}}
    line = refused(workload(train=Rows(lambda row, _: row), evals=Rows(lambda row, _: row, 5), **collate))
    assert "'x'[0] holds a list of float" in line


def test_a_numpy_array_is_named() -> None:
    line = refused(workload(train={"x": tensors()["x"].numpy(), "y": tensors()["y"]}))
    assert "'x' is a ndarray, not a tensor" in line


def test_tensors_of_other_lengths_are_named_with_their_lengths() -> None:
    line = refused(workload(train={"in": {"x": torch.zeros(4, 3)}, "y": torch.zeros(5)}))
    assert "'in'['x']: 4, 'y': 5" in line


def test_outputs_that_are_a_dict_say_which_tensor_to_return() -> None:
    line = refused(workload(outputs=lambda model, batch: {"loss": 0, "logits": model(batch["x"])}))
    assert "outputs return a dict, not a tensor with loss, logits" in line
    assert "['logits']" in line


def test_evaluation_examples_that_lack_a_key_are_told_it() -> None:
    line = refused(workload(evals={"x": tensors(5)["x"]}))
    assert "measure" in line
    assert "'y'" in line
    assert "add 'y' to the evaluation examples" in line


def test_a_key_that_neither_has_lists_those_that_there_are() -> None:
    line = refused(workload(loss=lambda out, batch: out[:, 0] - batch["target"]))
    assert "KeyError: 'target'" in line
    assert "the training batch has x, y" in line
    assert "test_contract.py, line" in line


def test_a_measure_may_read_what_only_evaluation_examples_have() -> None:
    checked(workload(evals={**tensors(5), "w": torch.ones(5)}, measure=lambda out, batch: out[:, 0] * batch["w"]))


@pytest.mark.parametrize(("side", "name"), [("train", "loss of training"), ("evals", "measure of evaluation")])
def test_a_number_that_is_not_finite_is_named_by_key_wherever_it_is(side: str, name: str) -> None:
    n = N if side == "train" else 5
    spoilt: Mapping[str, Tensor] = tensors(n)
    spoilt["x"][n - 1, 1] = torch.nan
    line = refused(workload(**{side: spoilt}), DivergedError)
    assert f"the {name} example {n - 1} is nan" in line
    assert "its 'x' holds a number that is not finite" in line


def test_a_number_that_is_not_finite_and_moves_no_loss_is_let_be() -> None:
    checked(workload(train={**tensors(), "unread": torch.full((N,), torch.nan)}))


def test_a_batch_whose_first_dimension_does_not_run_over_examples() -> None:
    flat = {
        "collate": lambda items: {"x": torch.cat([i["x"] for i in items]), "y": torch.stack([i["y"] for i in items])}
    }
    line = refused(workload(train=Rows(lambda row, _: row), evals=Rows(lambda row, _: row, 5), **flat))
    assert "training batch's 'x' has shape (12,) for 4 examples" in line


def test_a_dataset_of_tuples_says_what_its_batch_is() -> None:
    rows = torch.utils.data.TensorDataset(*tensors().values())
    line = refused(workload(train=rows, evals=rows))
    assert "the batch is a list of 2: use batch[0], …, or give a collate that makes a dict" in line


def test_paths_of_leaves_are_as_a_user_writes_them() -> None:
    batch = {"a": {"b": 1}, "c": [torch.ones(1), "s"], "d": ["s", "t"], "e": ()}
    assert [path for path, _ in leaves_of(batch)] == ["'a'['b']", "'c'[0]", "'c'[1]", "'d'", "'e'"]


def test_two_rows_of_one_id_are_refused_by_their_places() -> None:
    """An id leads back to the user's own row: a shared one leads to another's."""
    ids = [0, "1", 1, *range(3, N)]
    with pytest.raises(WorkloadError, match="training examples 1 and 2 are both '1'"):
        names_of(workload(ids=ids), N)
    assert names_of(workload(ids=range(N)), N) == {"ids": [str(i) for i in range(N)]}
