"""θᶠ is read as data alone, and refused in one line if it is not the model's."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import nn

from fimo.workers.errors import WorkloadError
from fimo.workers.final_model import check_fits, read_final_model
from fimo.workers.functional import FunctionalModel
from tests.workers.problems import regression


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight


def refused(to: nn.Module, state: dict[str, torch.Tensor]) -> str:
    with pytest.raises(WorkloadError) as error:
        check_fits(to, state, "final.safetensors")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_state_dict_survives_the_round_trip() -> None:
    state = model().state_dict()
    got = read_final_model(save(state), "final.safetensors")
    check_fits(model(), got, "final.safetensors")
    assert set(got) == set(state)
    assert all(torch.equal(got[n], state[n]) for n in state)


def test_missing_unexpected_misshapen_and_of_another_kind() -> None:
    state = model().state_dict()
    assert "it lacks '0.bias' (and 1 more)" in refused(
        model(), {n: t for n, t in state.items() if n not in ("0.bias", "2.bias")}
    )
    assert "the model has no 'head.weight'" in refused(model(), {**state, "head.weight": torch.zeros(2)})
    misshapen = refused(model(), {**state, "0.weight": torch.zeros(4, 2)})
    assert "'0.weight' has shape (4, 2), the model's is (4, 3)" in misshapen
    assert "'2.bias' is torch.int64" in refused(model(), {**state, "2.bias": torch.zeros(2, dtype=torch.int64)})
    assert "'2.bias' that are not finite" in refused(model(), {**state, "2.bias": torch.tensor([0.0, torch.nan])})
    assert "it lacks '1.running_mean'" in refused(model(), {n: t for n, t in state.items() if n != "1.running_mean"}), (
        "buffers are part of the final model"
    )


def test_tied_parameters_may_be_given_once_or_alike_and_not_twice_differently() -> None:
    weight = torch.arange(9.0).view(3, 3)
    check_fits(Tied(), {"a.weight": weight}, "x")
    check_fits(Tied(), {"b.weight": weight}, "x")
    check_fits(Tied(), {"a.weight": weight, "b.weight": weight.clone()}, "x")
    assert "'b.weight' and 'a.weight' are one parameter" in refused(
        Tied(), {"a.weight": weight, "b.weight": weight + 1}
    )


def test_tied_parameters_given_once_are_loaded_into_both() -> None:
    weight = torch.arange(9.0).view(3, 3)
    loaded = FunctionalModel(replace(regression(), model=Tied()), {"b.weight": weight})
    assert list(loaded.params) == ["a.weight"]
    assert torch.equal(loaded.params["a.weight"], weight)


class Runs:
    """A pickle that would run code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_renamed_to_safetensors_is_refused_and_does_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "the code ran"
    for data in (pickle.dumps(Runs(trap)), pickle.dumps({"0.weight": [1.0]})):
        with pytest.raises(WorkloadError, match=r"final\.safetensors is not a valid safetensors file"):
            read_final_model(data, "final.safetensors")
    assert not trap.exists()


def test_a_torch_save_file_is_refused(tmp_path: Path) -> None:
    torch.save(model().state_dict(), tmp_path / "model.pt")
    with pytest.raises(WorkloadError, match="not a valid safetensors file"):
        read_final_model((tmp_path / "model.pt").read_bytes(), "model.pt")


def test_torn_at_any_byte_it_is_refused() -> None:
    whole = save(model().state_dict())
    for length in [0, 1, 7, 8, 9, 50, *range(100, len(whole), 37), len(whole) - 1]:
        with pytest.raises(WorkloadError, match="not a valid safetensors file"):
            read_final_model(whole[:length], "torn")
