"""Columns of a workload's training tensors, by which removals are grouped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fimo.orchestrator.resolve.columns import read_column
from fimo.orchestrator.resolve.resolved import resolve
from fimo.workers.errors import UsageError
from fimo.workers.examples import Examples
from tests.support.own.flowers import Sentences
from tests.support.small_sweep import make_spec

N = 6


def examples(**tensors) -> Examples:
    return Examples({"x": torch.zeros(N, 3), **tensors})


def test_an_exact_name_comes_first_and_label_stands_for_the_usual_ones():
    a, b, c = torch.arange(N), torch.arange(N) + 10, torch.arange(N) + 20
    assert read_column(examples(label=a, labels=b, y=c), "label").tolist() == a.tolist()
    assert read_column(examples(labels=b, y=c), "label").tolist() == b.tolist()
    assert read_column(examples(y=c), "label").tolist() == c.tolist()
    assert read_column(examples(label=a, y=c), "y").tolist() == c.tolist()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_values_come_as_they_are(dtype):
    values = torch.tensor([0, 1, 1, 0, 1, 0]).to(dtype)
    column = read_column(examples(site=values), "site")
    assert column.tolist() == values.tolist()
    assert column.dtype.kind in "biuf"


def test_a_dataset_is_read_item_by_item():
    data = Sentences(17, 0)
    column = read_column(Examples(data), "label")
    assert column.tolist() == [item["label"] for item in data.items]


@pytest.mark.parametrize(
    ("tensors", "name", "said"),
    [
        ({"label": torch.arange(N)}, "lable", "no tensor 'lable' (did you mean 'label'?)"),
        ({"site": torch.arange(N)}, "label", "no tensor 'label' (known: site)"),
        ({}, "label", "no tensor 'label'; none of theirs has one value for each example"),
        ({}, "x", "the tensor 'x' is of shape (n, 3)"),
        ({"z": torch.zeros(N, dtype=torch.complex64)}, "z", "is complex"),
    ],
)
def test_what_is_no_column_is_refused_in_one_line(tensors, name, said):
    with pytest.raises(UsageError) as caught:
        read_column(examples(**tensors), name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_examples_without_names_have_no_column():
    pairs = torch.utils.data.TensorDataset(torch.zeros(N, 3), torch.arange(N))
    with pytest.raises(UsageError, match="no tensor 'label'"):
        read_column(Examples(pairs), "label")


def test_a_spec_grouped_by_label_resolves_to_the_labels_own_groups(beside):
    manifest = resolve(make_spec(removals={"by": "label"}), beside).manifest
    from tests.support.own.flowers import flowers

    labels = flowers().train["label"].numpy()
    expected = [(f"label={v}", tuple(np.flatnonzero(labels == v).tolist())) for v in np.unique(labels)]
    assert [(r.name, r.indices) for r in manifest.removals] == expected
