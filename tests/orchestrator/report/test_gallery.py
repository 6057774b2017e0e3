"""Examples are shown as what they are, the right one is, and a user's function that fails is one line."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from fimo.orchestrator.report.gallery import Gallery, shown
from fimo.workers.errors import WorkloadError
from fimo.workers.workload import Workload
from fimo.workers.workloads.tabular import DATA, concrete, read_header, read_table


def pixels(uri: str) -> np.ndarray:
    kind, _, data = uri.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def of(train, render=None, evals=None):
    none = lambda *_: None  # noqa: E731
    return Gallery(Workload(torch.nn.Linear(1, 1), train, evals or train, none, none, render=render))


def test_a_vector_is_the_row_of_a_table():
    found = of({"x": torch.tensor([[1.0, 2.5], [3.0, 4.0]]), "y": torch.tensor([0, 7])}).train(1)
    assert found.row == (("x[0]", "3"), ("x[1]", "4"), ("y", "7"))
    assert found.image is found.text is None


@pytest.mark.parametrize("shape", [(9, 8), (1, 9, 8), (9, 8, 1), (3, 9, 8), (9, 8, 3)])
def test_pixels_are_an_image_whichever_way_round(shape):
    values = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    found = of({"x": values, "y": torch.tensor([4, 5])}).train(1)
    plain = values[1].numpy()
    plain = np.moveaxis(plain, 0, 2) if shape[0] == 3 else plain.reshape(9, 8, -1)
    assert found.pixels == (8, 9)
    assert pixels(found.image).reshape(9, 8, -1) == pytest.approx(plain * 255, abs=0.51)
    assert found.row == (("y", "5"),)


def test_whole_numbers_up_to_255_are_taken_as_they_are_and_others_are_spread():
    grid = torch.arange(64).reshape(1, 8, 8)
    assert (pixels(of({"x": grid}).train(0).image) == grid[0].numpy()).all()
    found = pixels(of({"x": grid.double() - 100}).train(0).image)
    assert (found.min(), found.max()) == (0, 255)
    assert pixels(of({"x": torch.zeros(1, 8, 8) - 3}).train(0).image).max() == 0
    assert pixels(of({"x": torch.full((1, 8, 8), torch.nan)}).train(0).image).max() == 0


def test_a_text_is_a_text_and_a_long_one_is_cut():
    found = of({"i": torch.arange(3)}, render=lambda example: f"number {int(example['i'])}").train(2)
    assert found.text == "number 2"
    assert len(shown("word " * 1000, True).text) == 700
    mixed = shown({"text": "whole", "label": torch.tensor(1)}, True)
    assert (mixed.text, mixed.row) == ("whole", (("label", "1"),))


def test_a_dataset_s_items_are_shown_and_training_and_evaluation_are_not_mixed_up():
    train, evals = [{"t": "one"}, {"t": "two"}], [{"t": "three"}]
    gallery = of(train, evals=evals)
    assert [gallery.train(1).text, gallery.eval(0).text] == ["two", "three"]


def test_a_function_that_fails_is_one_line_that_names_the_example():
    with pytest.raises(WorkloadError, match=r"training example 1 cannot be shown: KeyError: 'z'; a workload's render"):
        of({"x": torch.zeros(2, 3)}, render=lambda example: example["z"]).train(1)


def test_a_row_of_concrete_is_shown_in_the_units_of_its_file():
    """Standardised rows said nothing to anybody; the split and its inverse must lead back to the very row."""
    path = DATA / "concrete.csv"
    table, names = read_table(path), read_header(path)
    rows = {tuple(f"{value:.4g}" for value in row) for row in table}
    gallery = Gallery(concrete())
    for index in (0, 5, 926):
        row = gallery.train(index).row
        assert [name for name, _ in row] == names
        assert tuple(value for _, value in row) in rows
    assert tuple(value for _, value in gallery.eval(3).row) in rows


def test_padding_and_its_mask_are_not_shown():
    train = {"ids": torch.tensor([[4, 5, 0], [6, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    assert of(train).train(0).row == (("ids", "4, 5"),)
    assert of(train).train(1).row == (("ids", "6"),)


def test_a_data_set_s_items_may_hold_more_than_was_trained_on_and_tensors_do_not():
    """What ``collate`` leaves out is in no digest: a page says so."""
    assert of([{"t": "one"}]).unguarded
    assert not of({"x": torch.zeros(2, 3)}).unguarded
