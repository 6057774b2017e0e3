"""Folktables' ACSIncome for Massachusetts in 2018, prepared as in the paper, with its MLP of two outputs.

Data: the Census Bureau's ACS Public Use Microdata Sample. The package folktables (extra ``folktables``) downloads it:

    from folktables import ACSDataSource
    source = ACSDataSource(survey_year="2018", horizon="1-Year", survey="person", root_dir="acs")
    source.get_data(states=["MA"], download=True), source.get_definitions(download=True)

and ``data: acs`` then names that folder. Categories are coded by their names in the definitions, as in the paper's own
code (github.com/IBM/fimoda): 791 columns. If ``data`` names the person CSV alone (``psam_p25.csv``), by their numbers:
other columns in another order, so another final model. Numeric columns (age, hours a week) are standardised on the
training rows, a quarter is held out for evaluation. Nothing is downloaded here.

Final model: ``RECIPE``, which is the paper's: SGD at 0.01, batches of 128, 100 epochs of cross-entropy, seed 0:

    python -m fimo.workers.workloads.income acs --to folktables.safetensors
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fimo.workers.settings import Optimizer
from fimo.workers.workload import Workload
from fimo.workers.workloads.files import Array, Source, extra, split, standardise
from fimo.workers.workloads.recipe import Recipe, main, network
from fimo.workers.workloads.tabular import classification, mlp

SOURCE = Source(
    "Folktables",
    "it by folktables' ACSDataSource(survey_year='2018', horizon='1-Year', survey='person').get_data(states=['MA'], "
    "download=True) and .get_definitions(download=True)",
    "2018/1-Year/psam_p25.csv and definition.csv of the Census Bureau's ACS PUMS",
)
PERSONS, DEFINITIONS = Path("2018", "1-Year", "psam_p25.csv"), Path("2018", "1-Year", "definition.csv")
NUMERIC = ("AGEP", "WKHP")
RECIPE = Recipe(Optimizer("sgd", lr=1e-2), epochs=100)

Part = tuple[Array, NDArray[np.int64]]
"""Features, float64 (rows, columns), and labels (rows,)."""


def prepare(features: Any, labels: NDArray[np.int64], numeric: Sequence[str], held_out: float) -> tuple[Part, Part]:
    """Dummies for all columns but the numeric ones, which are standardised on the training rows.

    Args:
        features: a pandas frame (rows, columns).
        labels: integers (rows,).
        numeric: the numeric columns; they come first in the result.
        held_out: share of the rows that are for evaluation.
    """
    pandas = extra("pandas", "folktables")
    frame = pandas.get_dummies(features, columns=[name for name in features.columns if name not in numeric])
    table = frame[[*numeric, *(name for name in frame.columns if name not in numeric)]].to_numpy(dtype=np.float64)
    train, evals = split(len(table), held_out)
    parts, count = (table[train], table[evals]), len(numeric)
    scaled = standardise(parts[0][:, :count], parts[1][:, :count])
    for part, columns in zip(parts, scaled, strict=True):
        part[:, :count] = columns
    return (parts[0], labels[train]), (parts[1], labels[evals])


def acs_income(persons: Path, definitions: Path | None) -> tuple[Any, NDArray[np.int64]]:
    """ACSIncome's features (a frame) and labels (income above 50,000 dollars) of the persons that it keeps.

    Args:
        definitions: the data dictionary, which names the categories; None = their numbers.

    Raises:
        UsageError: folktables is not installed, or a file is something else.
    """
    pandas, folktables = extra("pandas", "folktables"), extra("folktables", "folktables")
    problem, categories = folktables.ACSIncome, None
    try:
        people = pandas.read_csv(persons, dtype={"RT": str, "SOCP": str, "SERIALNO": str, "NAICSP": str})
        if definitions is not None:
            named = pandas.read_csv(definitions, sep=",", header=None, names=list(range(7)))
            categories = folktables.generate_categories(features=problem.features, definition_df=named)
        features, target, _ = problem.df_to_pandas(people, categories=categories)
    except (KeyError, ValueError, IndexError) as error:
        raise SOURCE.refuse(persons, f"is no ACS person file ({type(error).__name__}: {error})") from error
    return features, target.to_numpy().ravel().astype(np.int64)


def income(data: Path, initial: int | None = None, rows: int | None = 40_114) -> Workload:
    """ACSIncome, Massachusetts 2018 (30,085 training, 10,029 evaluation rows), with an MLP of 128-128-2.

    Args:
        data: folktables' ``root_dir``, or the person CSV.
        initial: None = the spec names a final model; else torch's default initialisation under this seed.
        rows: how many persons must be kept by ACSIncome's filter; None = any number.

    Raises:
        UsageError: in one line, if a file or package is missing, or a file is something else.
    """
    path = Path(data)
    if not path.exists():
        raise SOURCE.missing(path)
    persons, definitions = (path / PERSONS, path / DEFINITIONS) if path.is_dir() else (path, None)
    for needed in (persons, definitions):
        if needed is not None and not needed.is_file():
            raise SOURCE.missing(needed)
    features, labels = acs_income(persons, definitions)
    SOURCE.check_rows(path, len(labels), rows)
    train, evals = prepare(features, labels, NUMERIC, 0.25)
    return classification(train, evals, network(partial(mlp, train[0].shape[1], 128, 128, 2), initial))


if __name__ == "__main__":
    main(income, RECIPE)
