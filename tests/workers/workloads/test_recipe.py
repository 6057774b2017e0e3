"""A final model is what the recipe says, from a command line too; without one, nothing is started."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fimo
from fimo.workers.errors import WorkloadError
from fimo.workers.final_model import check_fits
from fimo.workers.functional import FunctionalModel
from fimo.workers.settings import FurtherTraining, Optimizer
from fimo.workers.workload import Workload
from fimo.workers.workloads import energy, recipe, tabular
from fimo.workers.workloads.recipe import Recipe, network
from tests.workers.workloads.tables import write_energy

SHORT = FurtherTraining(Optimizer("sgd", lr=0.03), 16, steps=2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.relu(self.norm(self.a(x))))
        return out


def tied(model: nn.Module) -> Workload:
    data = {"x": torch.arange(60.0).reshape(20, 3).sin()}
    return Workload(model, data, data, lambda model, batch: model(batch["x"]), lambda out, batch: out.square().sum(1))


def test_the_loop_is_the_plain_one(tmp_path: Path) -> None:
    """Against torch's own DataLoader, which draws the sampler's order by itself."""
    made = energy.energy(write_energy(tmp_path / "e.csv", 60), initial=3, rows=None)
    recipe.train(made, Recipe(Optimizer("sgd", lr=0.1), epochs=3, batch_size=16), seed=3)
    torch.manual_seed(3)
    model = tabular.mlp(8, 128, 128, 1)
    data = energy.energy(tmp_path / "e.csv", rows=None).train
    train = torch.utils.data.TensorDataset(data["x"], data["y"])
    # No generator for the loader itself, which would take a seed for its workers from it at every epoch.
    sampler = torch.utils.data.RandomSampler(train, generator=torch.Generator().manual_seed(3))
    loader = torch.utils.data.DataLoader(train, 16, sampler=sampler)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x).squeeze(1), y).backward()
            optimizer.step()
    for got, expected in zip(made.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_the_rate_rises_to_its_peak_and_falls_to_nothing() -> None:
    peaked = replace(energy.RECIPE, peak=0.25)
    rates = [peaked.rate(step, 100) for step in range(100)]
    assert max(rates) == pytest.approx(1.0, abs=0.02)
    assert rates.index(max(rates)) in (23, 24)
    assert rates[0] < 0.05
    assert rates[-1] < 0.05
    assert {energy.RECIPE.rate(step, 100) for step in range(100)} == {1.0}


def test_a_model_without_a_final_model_is_refused_wherever_it_is_started(tmp_path: Path) -> None:
    bare = energy.energy(write_energy(tmp_path / "e.csv", 60), rows=None)
    for start in (
        lambda: fimo.attribution(bare, SHORT, [[0]], [0]),
        lambda: fimo.attribution(bare, SHORT, [[0]], [0], stacked=True),
        lambda: FunctionalModel(bare),
    ):
        with pytest.raises(WorkloadError, match="name a final model") as caught:
            start()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bare_architecture_takes_its_final_model_as_a_whole_one_does(dtype: torch.dtype) -> None:
    whole, bare = network(Tied, 0), network(Tied, None)
    state = whole.state_dict()
    check_fits(bare, state, "final.safetensors")
    given, own = FunctionalModel(tied(bare), state, dtype=dtype), FunctionalModel(tied(whole), dtype=dtype)
    assert list(given.params) == list(own.params) == ["a.weight", "norm.weight", "norm.bias"]
    batch = {"x": torch.ones(2, 3, dtype=dtype)}
    torch.testing.assert_close(given.loss(given.params, batch), own.loss(own.params, batch), rtol=0, atol=0)
    assert all(tensor.is_meta for tensor in bare.parameters()), "the user's own is not touched"
    with pytest.raises(WorkloadError, match=r"'norm.weight' \(and 4 more\) is on the meta device"):
        FunctionalModel(tied(bare), {"a.weight": state["a.weight"]})


def test_another_start_is_another_seed_and_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (tabular.concrete(initial=seed).model.state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first["0.weight"], again["0.weight"])
    assert not torch.equal(first["0.weight"], other["0.weight"])
    torch.manual_seed(0)
    assert torch.equal(first["0.weight"], nn.Linear(8, 128).weight)


def test_the_command_trains_and_saves(tmp_path: Path) -> None:
    write_energy(tmp_path / "e.csv", 60)
    command = [sys.executable, "-m", "fimo.workers.workloads.energy", "e.csv", "--to", "new/e.safetensors"]
    options = ["--seed", "2", "--epochs", "3", "--device", "cpu"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *options, *more], cwd=tmp_path, capture_output=True, text=True, check=False)

    failed = run()
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: Energy: e.csv has 60 rows, not 768")
    done = run("--arguments", '{"rows": null}')
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].startswith("epoch 3/3, step 3/3: mean loss ")
    assert done.stdout.startswith("train loss ")
    workload = energy.energy(tmp_path / "e.csv", initial=2, rows=None)
    recipe.train(workload, replace(energy.RECIPE, epochs=3), 2)
    state = load_file(tmp_path / "new" / "e.safetensors")
    check_fits(workload.model, state, "e.safetensors")
    for name, tensor in workload.model.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6)


def test_tied_parameters_are_saved_once_and_fit(tmp_path: Path) -> None:
    model = network(Tied, 0)
    recipe.save(model, tmp_path / "t.safetensors")
    state = load_file(tmp_path / "t.safetensors")
    assert "b.weight" not in state
    check_fits(network(Tied, None), state, "t.safetensors")


def test_quality_is_the_mean_loss_and_the_accuracy_of_logits() -> None:
    x, y = torch.eye(3).repeat(100, 1), torch.tensor([0, 1, 1]).repeat(100)
    data = {"x": x, "y": y}
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(2 * torch.eye(3))
    found = recipe.quality(Workload(model, data, data, tabular.logits, tabular.cross_entropy))
    assert found["evals accuracy"] == pytest.approx(2 / 3)
    assert found["train loss"] == pytest.approx(float(nn.functional.cross_entropy(2 * x, y)), rel=1e-6)
