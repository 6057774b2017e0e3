"""FICO's HELOC (Explainable Machine Learning Challenge), prepared as in the paper, with its MLP of two outputs.

Data: the challenge's ``heloc_dataset_v1.csv``, from FICO's community page against its terms, or Kaggle's copy that the
paper's code names. Special codes are treated as the paper's own code does (github.com/IBM/fimoda,
fimoda/tabular/FICO_data.py), in this order:

* labels by alphabet (Bad 0, Good 1); rows with −9 in every column are left out (588 of 10,459);
* ``MSinceMostRecentDelq``: −7 (no delinquency) becomes the largest value plus 1, −8 the mean of the values from 0 on;
  ``MSinceMostRecentInqexcl7days``: −7 (an inquiry within the last week) becomes 0, −8 (none in two years) the largest
  value plus 1;
* ``MaxDelq2PublicRecLast12M`` above 7 becomes 7 ("current and never delinquent");
* every −8, then every −9 that is left becomes the mean of its column's values from 0 on.

A tenth is held out for evaluation; features are standardised on the training rows. Final model: ``RECIPE``, the
paper's: SGD at 0.001, batches of 128, 1000 epochs of cross-entropy, seed 0:

    python -m fimo.workers.workloads.heloc heloc_dataset_v1.csv --to heloc.safetensors
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fimo.workers.settings import Optimizer
from fimo.workers.workload import Workload
from fimo.workers.workloads.files import Array, Source, read_table, split, standardise
from fimo.workers.workloads.recipe import Recipe, main, network
from fimo.workers.workloads.tabular import classification, mlp

SOURCE = Source(
    "HELOC",
    "heloc_dataset_v1.csv from FICO's Explainable Machine Learning Challenge "
    "(https://community.fico.com/s/explainable-machine-learning-challenge)",
    "10,459 rows with the column RiskPerformance (Bad or Good) and 23 columns of numbers",
)
LABEL = "RiskPerformance"
RECIPE = Recipe(Optimizer("sgd", lr=1e-3), epochs=1000)


def prepare(
    features: Array, labels: NDArray[np.int64]
) -> tuple[tuple[Array, NDArray[np.int64]], tuple[Array, NDArray[np.int64]]]:
    """Hold out a tenth and standardise the features on the rest.

    Args:
        features: float64 (rows, columns).
        labels: integers (rows,).

    Returns:
        (features, labels) for training and for evaluation.
    """
    train, evals = split(len(labels), 0.1)
    of_train, of_evals = standardise(features[train], features[evals])
    return (of_train, labels[train]), (of_evals, labels[evals])


def impute(features: Array, names: list[str]) -> Array:
    """The table without special codes, by the module's rules; no row may consist of −9 alone.

    Args:
        features: float64 (rows, columns), codes included.
        names: of the columns.
    """
    table = features.copy()
    for place, name in enumerate(names):
        column = table[:, place]
        if name == "MSinceMostRecentDelq":
            mean = _mean(column)
            column[column == -7] = column.max() + 1
            column[column == -8] = mean
        elif name == "MSinceMostRecentInqexcl7days":
            column[column == -7] = 0
            column[column == -8] = column.max() + 1
        elif name == "MaxDelq2PublicRecLast12M":
            column[column > 7] = 7
        for code in (-8, -9):
            column[column == code] = _mean(column)
    return table


def _mean(column: Array) -> float:
    return float(column[column >= 0].mean()) if (column >= 0).any() else 0.0


def heloc(data: Path, initial: int | None = None, rows: int | None = 10_459) -> Workload:
    """HELOC (8,883 training, 988 evaluation rows) with the MLP 23-128-128-2.

    Args:
        data: the challenge's CSV.
        initial: None = the spec names a final model; else torch's default initialisation under this seed.
        rows: how many the file must have; None = any number.

    Raises:
        UsageError: in one line, if the file is missing or is something else.
    """
    path = Path(data)
    table = read_table(path, SOURCE)
    SOURCE.check_rows(path, len(table.rows), rows)
    verdicts, names = [str(v).strip() for v in table.column(LABEL)], [n for n in table.names if n != LABEL]
    if set(verdicts) != {"Bad", "Good"}:
        raise SOURCE.refuse(path, f"has other labels than Bad and Good: {', '.join(sorted(set(verdicts))[:3])}")
    if len(names) != 23:
        raise SOURCE.refuse(path, f"has {len(names)} columns of features, not 23")
    features, labels = table.numbers(names), np.array([verdict == "Good" for verdict in verdicts], dtype=np.int64)
    known = (features > -9).any(axis=1)
    train, evals = prepare(impute(features[known], names), labels[known])
    return classification(train, evals, network(partial(mlp, 23, 128, 128, 2), initial))


if __name__ == "__main__":
    main(heloc, RECIPE)
