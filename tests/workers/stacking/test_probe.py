"""What looks alike on the examples that are looked at and is not on others: nothing of it may be cut or folded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fimo.workers.errors import UsageError
from fimo.workers.workload import Workload
from tests.workers.problems import cross_entropy, make
from tests.workers.stacking.test_text import FULL, LANES, MODES, Unmasked, cheap_parts, chosen, hold, padded, text


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.query, self.classes = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
        each = self.mixed(self.query(self.words(input_ids)), attention_mask)
        mask = attention_mask[..., None]
        pooled = (each * mask).sum(1) / mask.sum(1) + self.beside(each)
        return type("Out", (), {"logits": self.classes(pooled)})

    def mixed(self, each: Tensor, mask: Tensor) -> Tensor:
        return torch.tanh(each)

    def beside(self, each: Tensor) -> Tensor | float:
        return 0.0


class FirstFour(Words):
    """Padding counts among the first four tokens alone."""

    def beside(self, each: Tensor) -> Tensor:
        return each[:, :4].mean(1)


class Gated(Words):
    """Padding counts as soon as the gate is open, which it is not at the final model."""

    def beside(self, each: Tensor) -> Tensor:
        return self.gate * each.mean(1)


class InPlace(Words):
    """Goes on with what dropout has written to."""

    def mixed(self, each: Tensor, mask: Tensor) -> Tensor:
        return each + nn.functional.dropout(each, 0.3, self.training, inplace=True)


class Reversed(Words):
    """Draws its masks from the last token to the first."""

    def mixed(self, each: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.dropout(each.flip(1), 0.3, self.training).flip(1)


class Forbids(Words):
    """A mask of −∞, of whole rows too."""

    def mixed(self, each: Tensor, mask: Tensor) -> Tensor:
        both = (mask[:, :, None] * mask[:, None, :]) > 0
        numbers = torch.zeros(both.shape, dtype=each.dtype).masked_fill(~both, -torch.inf)
        return nn.functional.scaled_dot_product_attention(each, each, each, numbers)


def lengthened(workload: Workload, places: list[int], length: int) -> Workload:
    for name in ("tokens", "attention_mask"):
        rows = workload.train[name][places, :length]
        workload.train[name][places, :length] = rows.masked_fill(rows == 0, 1)
    return workload


@pytest.mark.parametrize("mode", MODES)
def test_padding_that_counts_is_seen_where_most_examples_have_none(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_parts(monkeypatch)
    workload, training = lengthened(text(Unmasked()), list(range(14)), FULL), chosen(mode)
    start = make(workload, training)
    assert start.trimming is None
    hold(start, workload, training, LANES, 1e-11)


def test_padding_that_counts_for_the_shortest_alone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_parts(monkeypatch)
    workload = lengthened(text(FirstFour()), [i for i in range(23) if i not in (3, 9, 17)], 6)
    training = chosen("reweight")
    start = make(workload, training)
    assert start.trimming is None
    hold(start, workload, training, LANES, 1e-11)


def test_evaluations_are_not_cut_where_padding_counts_away_from_the_final_model() -> None:
    workload, training = text(Gated()), chosen("reweight")
    start = make(workload, training)
    assert start.evals.places is None
    hold(start, workload, training, LANES, 1e-11)


def by_the_batchs_tokens(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    mask = batch["attention_mask"].sum(1)
    return cross_entropy(outputs, batch) * mask * len(mask) / mask.sum()


def test_a_loss_over_the_tokens_of_its_batch_mixes_though_the_shortest_are_equally_long() -> None:
    train = padded(60, 1)
    for name in ("tokens", "attention_mask"):
        train[name][:30, 2:] = 0
    plain = text(Words())
    workload = Workload(plain.model, train, plain.evals, outputs=plain.outputs, loss=by_the_batchs_tokens)
    with pytest.raises(UsageError, match="mixes the examples"):
        make(workload, chosen("reweight"))
    for mode in ("drop", "mask"):
        start = make(workload, chosen(mode))
        assert start.forward.mixes
        hold(start, workload, chosen(mode), LANES, 1e-11)


@pytest.mark.parametrize("model", [InPlace, Forbids])
@pytest.mark.parametrize("mode", MODES)
def test_dropout_in_place_and_masks_of_minus_infinity(model: type, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_parts(monkeypatch)
    workload, training = text(model()), chosen(mode)
    start = make(workload, training)
    assert start.folds
    assert start.trimming is not None
    hold(start, workload, training, LANES, 1e-11)


def test_masks_drawn_from_the_right_are_not_cut_on_the_left(monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_parts(monkeypatch)
    # Of the first six none is cut.
    workload, training = lengthened(text(Reversed()), list(range(6)), FULL), chosen("reweight")
    start = make(workload, training)
    assert start.trimming is None
    hold(start, workload, training, LANES, 1e-11)
