"""UCI Energy Efficiency (ENB2012), heating load, prepared as in the paper, with its MLP.

Data: UCI dataset 242 (A. Tsanas and A. Xifara 2012, CC BY 4.0), as the workbook or as a CSV with the same header.
Cooling load Y2 is not used. Final model: ``RECIPE``, which is the paper's: SGD at 0.3, batches of 128, 1000 epochs of
mean squared error, seed 0 (github.com/IBM/fimoda, tabular_regression.ipynb; mean squared error 0.0009 over the last
epoch of training, 0.0027 on the evaluation rows there):

    python -m fimo.workers.workloads.energy ENB2012_data.xlsx --to energy.safetensors
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from fimo.workers.workload import Workload
from fimo.workers.workloads.files import Source, read_table
from fimo.workers.workloads.recipe import main, network
from fimo.workers.workloads.tabular import RECIPE, mlp, regression

SOURCE = Source(
    "Energy",
    "ENB2012_data.xlsx of UCI dataset 242 (https://archive.ics.uci.edu/dataset/242/energy+efficiency)",
    "768 rows with the columns X1 to X8 and Y1, as .xlsx or .csv",
)
COLUMNS = ("X1", "X2", "X3", "X4", "X5", "X6", "X7", "X8", "Y1")


def energy(data: Path, initial: int | None = None, rows: int | None = 768) -> Workload:
    """Energy (691 training, 77 evaluation rows) with the MLP 8-128-128-1.

    Args:
        data: ``ENB2012_data.xlsx``, or a CSV of the same columns.
        initial: None = the spec names a final model; else torch's default initialisation under this seed.
        rows: how many the file must have; None = any number.

    Raises:
        UsageError: in one line, if the file is missing or is something else.
    """
    path = Path(data)
    table = read_table(path, SOURCE).numbers(COLUMNS)
    SOURCE.check_rows(path, len(table), rows)
    return regression(table, network(partial(mlp, 8, 128, 128, 1), initial), COLUMNS)


if __name__ == "__main__":
    main(energy, RECIPE)
