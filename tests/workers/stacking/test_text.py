"""Text trimmed, cut into parts and folded, with dropout, against the definition, which trains on all the padding."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from fimo.workers import further_training
from fimo.workers.definition import train_cell
from fimo.workers.further_training import further_train
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.stacking.parts import MOST, _ends
from fimo.workers.stacking.stacked import CannotStackError, Stacked
from fimo.workers.start import Engine, Start
from fimo.workers.workload import Workload
from tests.support.covering import covering
from tests.workers.problems import cross_entropy, make, settings
from tests.workers.test_bert import bert

ADAMW = Optimizer("adamw", lr=1e-3, weight_decay=0.1)
FULL = 14
MODES = ["drop", "mask", "reweight"]
LANES = [(), (3,), (17,), (5,)]


def padded(count: int, seed: int, full: int = FULL) -> dict[str, Tensor]:
    """Sentences of 2 to ``full`` − 2 tokens, most of them short."""
    g = torch.Generator().manual_seed(seed)
    lengths = 2 + (torch.rand(count, generator=g) ** 3 * (full - 3)).long()
    mask = torch.arange(full) < lengths[:, None]
    tokens = torch.randint(1, 20, (count, full), generator=g) * mask
    return {"tokens": tokens, "attention_mask": mask.long(), "label": torch.randint(0, 3, (count,), generator=g)}


def text(model: nn.Module, n: int = 23, evals: int = 6, **more: object) -> Workload:
    return Workload(
        model,
        padded(n, 1),
        padded(evals, 2),
        outputs=lambda m, batch: m(input_ids=batch["tokens"], attention_mask=batch["attention_mask"]).logits,
        loss=cross_entropy,
        **more,
    )


def chosen(mode: str, **more: object) -> FurtherTraining:
    defaults = {"clip_norm": 1.0, "steps": 7, "evaluate": Evaluate(at_steps=(1, 3, 6)), "batch_size": 8}
    return settings(ADAMW, removal_mode=mode, **{**defaults, **more})


def cheap_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part costs nothing, so that small batches are cut too."""
    monkeypatch.setattr(further_training, "part_cost", lambda *_: 1.0)


def hold(start: Start, workload: Workload, mode: FurtherTraining, lanes: list[tuple[int, ...]], tight: float) -> None:
    got = further_train(start, lanes, 5)
    for lane, removal in enumerate(lanes):
        cell = train_cell(workload, mode, removal, 5)
        assert cell.deltas.abs().max() > 1e-3
        torch.testing.assert_close(got.deltas[lane], cell.deltas, rtol=tight, atol=tight)
        torch.testing.assert_close(got.distances[lane], cell.distances, rtol=tight, atol=tight)


@pytest.mark.parametrize(
    ("dropout", "attention", "mode", "lanes"),
    covering([0.0, 0.2], ["eager", "sdpa"], MODES, [LANES, [()], [(3,)]]),
)
def test_parts_of_a_batch_have_the_definitions_numbers_and_its_dropout(
    lanes: list[tuple[int, ...]], dropout: float, attention: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cheap_parts(monkeypatch)
    workload, training = text(bert(attention=attention, dropout=dropout)), chosen(mode)
    start = make(workload, training)
    assert start.trimming is not None
    assert start.folds
    assert start.evals.places is not None
    assert len(start.calls) == (0 if dropout == 0 else 8)
    hold(start, workload, training, lanes, 1e-11)


def test_groups_of_several_sizes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_parts(monkeypatch)
    workload = text(bert(attention="sdpa", dropout=0.2))
    for mode in MODES:
        training = chosen(mode, precision="float32")
        hold(make(workload, training), workload, training, [(), (3, 4, 20), (17,), (1, 2)], 2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_trimming_changes_nothing_but_rounding(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_parts(monkeypatch)
    start = make(text(bert(attention="sdpa", dropout=0.1)), chosen(mode, precision="float32"))
    plain = start.using(Engine(trim=False))
    assert plain.trimming is None
    assert plain.evals.places is None
    trimmed, untrimmed = (further_train(s, LANES, 1).deltas for s in (start, plain))
    assert not torch.equal(trimmed, untrimmed), "nothing was trimmed"
    torch.testing.assert_close(trimmed, untrimmed, rtol=0, atol=1e-6)


@pytest.mark.parametrize("patterns", [("classifier.*",), ("*layer.1.*", "classifier.*")])
def test_what_is_frozen_is_computed_once_for_all_replicas(
    patterns: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    cheap_parts(monkeypatch)
    workload, training = (
        text(bert(attention="sdpa", dropout=0.2)),
        chosen("reweight", trainable=patterns, removal_weight=4.0),
    )
    start = make(workload, training)
    hold(start, workload, training, LANES, 1e-11)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("trainable", ["all", ("classifier.*",)])
def test_replicas_of_which_some_have_no_padding_are_stacked(
    trainable: object, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks each replica's batch whether it has any."""
    cheap_parts(monkeypatch)
    workload, training = text(bert(attention="sdpa", dropout=0.2)), chosen(mode, trainable=trainable)
    for name in ("tokens", "attention_mask"):
        workload.train[name][[2, 3, 9]] = 1
        workload.train[name][17, : FULL - 1] = 1
    start = make(workload, training)
    assert start.trimming is not None
    hold(start, workload, training, [(), (3,), (17,), (9,)], 1e-11)


class Unmasked(nn.Module):
    """Averages over all tokens, those of the padding too."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.classes = nn.Embedding(20, 6), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
        return type("Out", (), {"logits": self.classes(torch.tanh(self.words(input_ids)).mean(1))})


def test_padding_that_counts_is_not_cut() -> None:
    torch.manual_seed(0)
    workload, training = text(Unmasked()), chosen("reweight")
    start = make(workload, training)
    assert start.trimming is None
    assert start.evals.places is None
    hold(start, workload, training, LANES, 1e-11)


class Flat(nn.Module):
    """Masks tokens of all examples in one dimension: rows cannot be told from tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.classes, self.drop = nn.Embedding(20, 6), nn.Linear(6, 3), nn.Dropout(0.3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
        each = self.drop(self.words(input_ids).reshape(-1, 6)).reshape(*input_ids.shape, 6)
        each = each * attention_mask[..., None]
        return type("Out", (), {"logits": self.classes(each.sum(1) / attention_mask.sum(1, keepdim=True))})


class OwnNoise(Flat):
    """Draws something else than dropout."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
        each = self.words(input_ids) * attention_mask[..., None]
        each = each + 0.1 * torch.randn_like(each) if self.training else each
        return type("Out", (), {"logits": self.classes(each.sum(1))})


def test_a_part_that_draws_less_often_than_its_batch_is_refused() -> None:
    """Seen where it happens: what was looked at drew as often as it should."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))
    mode = Stacked(orders=[(0, 1), (0, 1)], masks=lambda place, shape, p: torch.ones(shape, dtype=torch.bool))
    with mode:
        model(torch.ones(2, 4))
    with pytest.raises(CannotStackError, match="less often"):
        mode.check_all_called()


@pytest.mark.parametrize("model", [Flat, OwnNoise])
def test_random_numbers_that_cannot_be_told_apart_are_drawn_as_the_definition_draws_them(model: type) -> None:
    torch.manual_seed(0)
    workload, training = text(model()), chosen("reweight")
    start = make(workload, training)
    assert not start.folds
    assert start.trimming is None
    hold(start, workload, training, LANES, 1e-11)


def test_padding_at_the_front_or_under_another_name_is_left_alone() -> None:
    workload, training = text(bert()), chosen("reweight")
    turned = {name: t.flip(1) if t.dim() == 2 else t for name, t in workload.train.items()}
    assert make(replace(workload, train=turned), training).trimming is None
    assert make(replace(workload, padding=None), training).trimming is None
    named = {"mask" if name == "attention_mask" else name: t for name, t in workload.train.items()}
    assert "mask" in named
    evals = {"mask" if name == "attention_mask" else name: t for name, t in workload.evals.items()}
    renamed = replace(
        workload,
        train=named,
        evals=evals,
        padding="mask",
        outputs=lambda m, batch: m(input_ids=batch["tokens"], attention_mask=batch["mask"]).logits,
    )
    assert make(renamed, training).trimming is not None


class Encoder(nn.Module):
    """torch's own encoder layer, with its key padding mask."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.classes = nn.Embedding(20, 8), nn.Linear(8, 3)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
        hidden = self.layer(self.words(input_ids), src_key_padding_mask=attention_mask == 0)
        return type("Out", (), {"logits": self.classes(hidden[:, 0])})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_torchs_own_multi_head_attention(dropout: float, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_parts(monkeypatch)
    workload, training = text(Encoder(dropout)), chosen(mode)
    start = make(workload, training)
    assert start.folds
    assert start.trimming is not None
    assert len(start.calls) == (4 if dropout else 0)
    hold(start, workload, training, LANES, 1e-11)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_attention_is_not_taken_replica_by_replica(dropout: float) -> None:
    """torch warns when vmap falls back to a loop over replicas."""
    start = make(text(bert(attention="sdpa", dropout=dropout)), chosen("drop"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        further_train(start, LANES, 1)


def test_where_parts_end_is_the_least_of_all_ways() -> None:
    def total(lengths: list[int], ends: tuple[int, ...], cost: float) -> float:
        begins = (0, *ends[:-1])
        return sum((end - begin) * lengths[end - 1] + cost for begin, end in zip(begins, ends, strict=True))

    g = torch.Generator().manual_seed(0)
    for trial in range(60):
        count = 1 + trial % 9
        lengths = torch.randint(1, 30, (count,), generator=g).sort().values.tolist()
        for cost in (0.0, 3.0, 20.0, 60.0):
            ways = (
                (*cuts, count) for parts in range(min(MOST, count)) for cuts in combinations(range(1, count), parts)
            )
            best = min(total(lengths, way, cost) for way in ways)
            assert total(lengths, tuple(_ends(lengths, cost)), cost) == pytest.approx(best)


def test_the_papers_own_loop_at_a_fixed_length_without_trimming(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written out here: all batches padded to 64 tokens, the removed example's loss over n subtracted, clipped."""
    cheap_parts(monkeypatch)
    model = bert(attention="eager", positions=64)
    workload, lr, n = text(model), 2e-4, 23
    training = chosen("reweight", precision="float32", steps=8, evaluate=Evaluate(at_steps=(6,)))
    training = replace(training, optimizer=Optimizer("adamw", lr=lr, weight_decay=0.0))
    got = further_train(make(workload, training), [(), (3,), (17,)], 4).deltas
    fixed, evals = (
        {name: nn.functional.pad(t, (0, 64 - FULL)) if t.dim() == 2 else t for name, t in data.items()}
        for data in (workload.train, workload.evals)
    )

    def losses(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = net(input_ids=batch["tokens"], attention_mask=batch["attention_mask"]).logits
        return nn.functional.cross_entropy(logits, batch["label"], reduction="none")

    for lane, removed in enumerate([None, 3, 17]):
        net = bert(attention="eager", positions=64)
        optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0)
        sampler = torch.utils.data.RandomSampler(range(n), generator=torch.Generator().manual_seed(4))
        loader = [i for _ in range(3) for i in torch.utils.data.BatchSampler(sampler, 8, drop_last=False)]
        before, after = losses(net.eval(), evals).double(), []
        for step, indices in enumerate(loader[:8], start=1):
            net.train()
            optimizer.zero_grad()
            total = losses(net, {name: t[indices] for name, t in fixed.items()}).mean()
            if removed is not None:
                total = total - losses(net, {name: t[[removed]] for name, t in fixed.items()}).sum() / n
            total.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            if step in (6, 8):
                with torch.no_grad():
                    after.append(losses(net.eval(), evals).double() - before)
        expected = torch.stack(after).detach()
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(got[lane], expected, rtol=0, atol=1e-5)
