"""The shipped workload is the paper's preparation, and its final model is what the documented recipe gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.workloads import recipe, tabular
from tests.workers.test_against_definition import hold


def test_the_table_is_ucis() -> None:
    table = tabular.read_table(tabular.DATA / "concrete.csv")
    assert table.shape == (1030, 9)
    assert table[:, -1].mean() == pytest.approx(35.817961, abs=1e-6)
    assert (table[:, -1].min(), table[:, -1].max()) == (2.33, 82.6)
    assert len(table) - len(np.unique(table, axis=0)) == 25


def test_the_preparation_equals_scikit_learns() -> None:
    model_selection = pytest.importorskip("sklearn.model_selection")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    table = tabular.read_table(tabular.DATA / "concrete.csv")
    train, evals = model_selection.train_test_split(table, test_size=0.1, random_state=0)
    scaler = preprocessing.StandardScaler().fit(train)
    for got, expected in zip(tabular.prepare(table), (scaler.transform(train), scaler.transform(evals)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_the_workload_is_the_papers() -> None:
    workload = tabular.concrete()
    assert [len(part["y"]) for part in (workload.train, workload.evals)] == [927, 103]
    assert sum(p.numel() for p in workload.model.parameters()) == 17_793
    assert [type(m) for m in workload.model] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    with torch.no_grad():
        mean_loss = workload.loss(workload.outputs(workload.model, workload.train), workload.train).mean()
    assert mean_loss < 0.06, "the final model is trained"


@pytest.mark.parametrize("mode", ["drop", "reweight"])
def test_an_epoch_of_the_papers_setting_against_the_reference(mode: str) -> None:
    chosen = FurtherTraining(
        Optimizer("sgd", lr=0.03), 128, epochs=2, removal_mode=mode, evaluate=Evaluate(every_epochs=1)
    )
    hold(tabular.concrete(), chosen, [(), (0,), (9,), (891,)])


@pytest.mark.slow
def test_the_shipped_final_model_is_reproduced_by_its_recipe() -> None:
    """As far as the recipe reproduces itself: 1000 epochs at 0.3 make a tenth of a weight of a rounding error."""
    shipped = load_file(tabular.DATA / "concrete.safetensors")
    again, rounded, other = trained(0), trained(0, off=1e-6), trained(1)
    assert apart(again, shipped) < 2 * apart(again, rounded), "no farther than what rounds otherwise"
    assert apart(again, shipped) < 0.2 * apart(other, shipped), "another initial model gives another"


def trained(initial: int, off: float = 0.0) -> dict[str, torch.Tensor]:
    """The recipe's model, from weights that are a share ``off`` too large."""
    workload = tabular.concrete(initial=initial)
    with torch.no_grad():
        for parameter in workload.model.parameters():
            parameter.mul_(1 + off)
    recipe.train(workload, tabular.RECIPE, seed=0)
    return workload.model.state_dict()


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The length of the difference of two models."""
    return sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5
