"""The paper's tables: prepared as its code does, held against pandas, scikit-learn and folktables themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fimo
from fimo.workers.errors import UsageError
from fimo.workers.settings import FurtherTraining, Optimizer
from fimo.workers.workload import Workload
from fimo.workers.workloads import energy, files, heloc, income, recipe, tabular
from tests.support import real_data
from tests.workers.workloads.tables import HELOC, write, write_acs, write_energy, write_heloc

FIRST_ROW = [0.2555, -0.4051, 0.5433, -0.6588, 1.0044, 1.3569, 0.1094, 1.4007, 1.6379]
"""Energy's first training row as the paper's code prints it."""


def agree(workload: Workload, training: FurtherTraining, removals: list[list[int]]) -> torch.Tensor:
    """Effects by the definition in float64, which stacks must give to rounding."""
    training = replace(training, precision="float64")
    evals = {name: tensor[:30] for name, tensor in workload.evals.items()}
    workload = Workload(workload.model, workload.train, evals, workload.outputs, workload.loss)
    plain = fimo.attribution(workload, training, removals, [0, 1])
    stacked = fimo.attribution(workload, training, removals, [0, 1], stacked=True)
    assert float(plain.effects.abs().max()) > 1e-6
    torch.testing.assert_close(stacked.effects, plain.effects, rtol=1e-6, atol=1e-10)
    return plain.effects


def test_energy_is_prepared_as_in_the_paper() -> None:
    made = energy.energy(real_data.own("energy.csv"))
    assert [len(part["y"]) for part in (made.train, made.evals)] == [691, 77]
    first = [*made.train["x"][0].tolist(), float(made.train["y"][0])]
    assert first == pytest.approx(FIRST_ROW, abs=5e-5)
    assert sum(p.numel() for p in made.model.parameters()) == 17_793


def test_energy_copes_with_its_copies(tmp_path: Path) -> None:
    made = energy.energy(write_energy(tmp_path / "e.csv", 60), rows=None)
    assert made.train["x"].shape == (54, 8)
    table = np.random.default_rng(0).normal(size=(60, 10)).round(3)
    train, _ = tabular.prepare(table[:, :9])
    np.testing.assert_allclose(made.train["x"].numpy(), train[:, :8], atol=1e-6)
    with pytest.raises(UsageError, match=r"Energy: .*has 60 rows, not 768.*get ENB2012_data.xlsx of UCI dataset 242"):
        energy.energy(tmp_path / "e.csv")


def test_heloc_s_special_codes_become_what_the_paper_makes_of_them(tmp_path: Path) -> None:
    pandas: Any = pytest.importorskip("pandas")
    selection, preprocessing = (pytest.importorskip(f"sklearn.{name}") for name in ("model_selection", "preprocessing"))
    path = write_heloc(tmp_path / "h.csv", 400)
    frame = pandas.read_csv(path).astype(dict.fromkeys(HELOC, float))
    frame = frame[(frame[HELOC] != -9).any(axis=1)]
    y = (frame.pop("RiskPerformance") == "Good").to_numpy().astype(int)
    delinquent, inquiry = "MSinceMostRecentDelq", "MSinceMostRecentInqexcl7days"
    mean = frame[delinquent].where(frame[delinquent] >= 0).mean()
    frame[delinquent] = frame[delinquent].replace({-7: frame[delinquent].max() + 1, -8: mean})
    frame[inquiry] = frame[inquiry].replace({-7: 0, -8: frame[inquiry].max() + 1})
    frame["MaxDelq2PublicRecLast12M"] = frame["MaxDelq2PublicRecLast12M"].clip(upper=7)
    for code in (-8, -9):
        frame = frame.mask(frame == code, frame.where(frame >= 0).mean(), axis=1)
    assert (frame >= 0).all(axis=None)
    x_train, x_evals, y_train, y_evals = selection.train_test_split(frame, y, test_size=0.1, random_state=0)
    scaler = preprocessing.StandardScaler().fit(x_train)
    made = heloc.heloc(path, initial=0, rows=None)
    for part, x, labels in ((made.train, x_train, y_train), (made.evals, x_evals, y_evals)):
        np.testing.assert_allclose(part["x"].numpy(), scaler.transform(x), atol=1e-5)
        np.testing.assert_array_equal(part["y"].numpy(), labels)
    assert made.outputs(made.model, made.evals).shape == (38, 2)
    agree(made, FurtherTraining(Optimizer("adam", lr=1e-3), 64, epochs=1, removal_mode="drop"), [[0], [5, 9]])


def test_heloc_s_rows_are_counted_as_in_the_paper() -> None:
    """10,459 rows of which 588 have no record."""
    train, evals = files.split(10_459 - 588, 0.1)
    assert (len(train), len(evals)) == (8_883, 988)
    train, evals = files.split(40_114, 0.25)
    assert (len(train), len(evals)) == (30_085, 10_029)


@pytest.mark.parametrize(
    ("header", "row", "said"),
    [
        (["RiskPerformance", *HELOC], ["Fair", *range(23)], "has other labels than Bad and Good: Fair"),
        (HELOC, list(range(23)), "has no column 'RiskPerformance'"),
    ],
)
def test_another_table_is_not_heloc(tmp_path: Path, header: list[str], row: list[object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        heloc.heloc(write(tmp_path / "h.csv", header, [row]), rows=None)


def test_real_tumours_prepared_as_heloc_train_and_are_attributed() -> None:
    selection, preprocessing = (pytest.importorskip(f"sklearn.{name}") for name in ("model_selection", "preprocessing"))
    features, labels = real_data.breast_cancer()
    train, evals = heloc.prepare(features, labels)
    x_train, x_evals, y_train, y_evals = selection.train_test_split(features, labels, test_size=0.1, random_state=0)
    scaler = preprocessing.StandardScaler().fit(x_train)
    np.testing.assert_allclose(train[0], scaler.transform(x_train), atol=1e-9)
    np.testing.assert_allclose(evals[0], scaler.transform(x_evals), atol=1e-9)
    np.testing.assert_array_equal(train[1], y_train)
    np.testing.assert_array_equal(evals[1], y_evals)
    made = tabular.classification(train, evals, recipe.network(lambda: tabular.mlp(30, 128, 128, 2), 0))
    recipe.train(made, recipe.Recipe(Optimizer("sgd", lr=0.05), epochs=20), 0)
    assert recipe.quality(made)["evals accuracy"] > 0.9
    agree(made, FurtherTraining(Optimizer("sgd", lr=0.05), 128, epochs=2, removal_mode="drop"), [[0], [3], [500, 7]])


def test_folktables_columns_are_the_paper_s(tmp_path: Path) -> None:
    """The definitions' names, in folktables' own order; numeric columns first."""
    folktables: Any = pytest.importorskip("folktables")
    root = write_acs(tmp_path / "acs", 500)
    source = folktables.ACSDataSource(survey_year="2018", horizon="1-Year", survey="person", root_dir=str(root))
    names = folktables.generate_categories(folktables.ACSIncome.features, source.get_definitions())
    x, y, _ = folktables.ACSIncome.df_to_pandas(source.get_data(states=["MA"]), categories=names, dummies=True)
    assert list(x.columns[:2]) == ["AGEP", "WKHP"]
    table, (train, evals) = x.to_numpy(dtype=float).copy(), files.split(len(x), 0.25)
    table[:, :2] = (table[:, :2] - table[train, :2].mean(axis=0)) / table[train, :2].std(axis=0)
    made = income.income(root, initial=0, rows=None)
    for part, rows in ((made.train, train), (made.evals, evals)):
        np.testing.assert_allclose(part["x"].numpy(), table[rows], atol=1e-5)
        np.testing.assert_array_equal(part["y"].numpy(), y.to_numpy().ravel()[rows].astype(int))
    alone = income.income(root / income.PERSONS, rows=None)
    assert alone.train["x"].shape == made.train["x"].shape
    assert not torch.equal(alone.train["x"], made.train["x"]), "numbers sort otherwise than names"
    agree(made, FurtherTraining(Optimizer("sgd", lr=1e-2), 128, epochs=1, removal_mode="drop"), [[0], [5, 9]])


def test_what_folktables_lacks_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("folktables")
    root = write_acs(tmp_path / "acs", 100)
    with pytest.raises(UsageError, match=r"Folktables: .* rows, not 40,114"):
        income.income(root)
    (root / income.DEFINITIONS).unlink()
    with pytest.raises(UsageError, match=r"definition\.csv is neither beside the spec.*download=True"):
        income.income(root, rows=None)
    other = write(tmp_path / "other.csv", ["AGEP"], [[30]])
    with pytest.raises(UsageError, match="is no ACS person file") as caught:
        income.income(other, rows=None)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="is neither beside the spec"):
        income.income(tmp_path / "nowhere")


def test_adult_prepared_as_folktables_trains_and_is_attributed() -> None:
    compose, preprocessing = (pytest.importorskip(f"sklearn.{name}") for name in ("compose", "preprocessing"))
    frame = real_data.adult()
    labels = (frame.pop("income") == ">50K").to_numpy().astype(np.int64)
    assert len(frame) == 32_561
    assert labels.mean() == pytest.approx(0.2408, abs=5e-5)
    numeric = ["age", "education-num", "capital-gain", "capital-loss", "hours-per-week"]
    named = [name for name in frame.columns if name not in numeric]
    train, evals = income.prepare(frame, labels, numeric, 0.25)
    rows, held_out = files.split(len(frame), 0.25)
    coded = compose.ColumnTransformer(
        [("n", preprocessing.StandardScaler(), numeric), ("c", preprocessing.OneHotEncoder(sparse_output=False), named)]
    )
    # Categories of all rows, as in the paper; means of the training rows alone.
    coded.fit(frame)
    coded.named_transformers_["n"].fit(frame.iloc[rows][numeric])
    np.testing.assert_allclose(train[0], coded.transform(frame.iloc[rows]), atol=1e-9)
    np.testing.assert_allclose(evals[0], coded.transform(frame.iloc[held_out]), atol=1e-9)
    width = train[0].shape[1]
    made = tabular.classification(train, evals, recipe.network(lambda: tabular.mlp(width, 128, 128, 2), 0))
    recipe.train(made, recipe.Recipe(Optimizer("sgd", lr=0.1), epochs=2), 0)
    assert recipe.quality(made)["evals accuracy"] > 0.82
    # The first 4,000 people: an epoch of all is long for a test.
    some = {name: tensor[:4000] for name, tensor in made.train.items()}
    made = Workload(made.model, some, made.evals, made.outputs, made.loss)
    agree(made, FurtherTraining(Optimizer("sgd", lr=1e-2), 128, epochs=1, removal_mode="drop"), [[0], [17]])
