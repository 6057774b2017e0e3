"""Ways in which a fast engine gets a wrong number and no error: all must give the definition's numbers, or refuse.

Each was found by an audit: a stack, a folded batch or a traced step trusted after one look at one batch at θᶠ.
"""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fimo.workers.definition import train_cell
from fimo.workers.errors import UsageError, WorkloadError
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.shard import run_shard
from fimo.workers.workload import Workload
from tests.support.covering import covering
from tests.workers.problems import Encoder, classification, cross_entropy, make, regression, settings

MODES = ["drop", "mask", "reweight"]
MOMENTUM = Optimizer("sgd", lr=0.05, momentum=0.9, weight_decay=0.05)
ADAMW = Optimizer("adamw", lr=0.01, weight_decay=0.1)
REMOVALS = [(3,), (7,), (11, 12), (22,), (0,)]


def hold(
    workload: Workload, chosen: FurtherTraining, replicas: int = 4, removals: list[tuple[int, ...]] = REMOVALS
) -> Any:
    """Every cell of a shard of 6, in stacks of 4 and 2 (or 5 and 1), against the definition."""
    start = make(workload, chosen)
    shard = run_shard(start, removals, 5, replicas)
    tight = {"float64": 1e-9, "float32": 1e-5}[chosen.precision]
    for row, removal in enumerate([*removals, ()]):
        cell = train_cell(workload, chosen, removal, 5)
        scale = float(cell.deltas.abs().max())
        assert scale > 1e-4, "a run that does not move shows nothing"
        torch.testing.assert_close(shard.deltas[row], cell.deltas, rtol=tight, atol=tight * scale)
    return start


class Forward(nn.Module):
    """A layer, something done to its output by the test, a layer."""

    def __init__(self, middle: Any) -> None:
        super().__init__()
        self.first, self.last, self.middle = nn.Linear(4, 8), nn.Linear(8, 3), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(self, x, self.first(x))))


@pytest.mark.parametrize("read", [Tensor.tolist, lambda t: t.numpy().tolist(), lambda t: [v.item() for v in t]])
def test_a_measure_that_reads_labels_in_python_over_several_blocks(read: Any) -> None:
    workload = classification(evals=300)
    workload = replace(
        workload,
        measure=lambda out, batch: torch.stack([row[i] for row, i in zip(out, read(batch["label"]), strict=True)]),
    )
    hold(workload, settings(epochs=8, removal_mode="reweight"))


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_that_reads_its_batch_in_python(mode: str) -> None:
    scaled = lambda m, x, h: h * (1 + float(np.tanh(x[:, 0].detach().numpy()).mean()))  # noqa: E731
    counted = lambda m, x, h: h * (1 + len([v for v in x[:, 0].tolist() if v > 0]))  # noqa: E731
    for middle in (scaled, counted):
        if mode == "reweight":
            with pytest.raises(UsageError, match="mixes the examples"):
                make(classification(model=Forward(middle)), settings(removal_mode=mode))
        else:
            hold(classification(model=Forward(middle)), settings(epochs=8, removal_mode=mode))


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_that_reads_a_parameter_by_numpy(mode: str) -> None:
    middle = lambda m, x, h: h * (1 + float(np.abs(m.first.bias.detach().numpy()).sum()))  # noqa: E731
    hold(classification(model=Forward(middle)), settings(epochs=8, removal_mode=mode))


class Words(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(9, 6, **options), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.words(tokens)).mean(1))


def words(**options: Any) -> Workload:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 9, (29, 5), generator=generator)
    label = torch.randint(3, (29,), generator=generator)
    return Workload(
        Words(**options),
        {"tokens": tokens[:23], "label": label[:23]},
        {"tokens": tokens[23:], "label": label[23:]},
        outputs=lambda model, batch: model(batch["tokens"]),
        loss=cross_entropy,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{"padding_idx": 0}, {"padding_idx": -1}, {"sparse": True}])
def test_the_padding_row_of_an_embedding_has_no_gradient_in_any_replica(mode: str, options: dict[str, Any]) -> None:
    hold(words(**options), settings(MOMENTUM, removal_mode=mode, epochs=8))


@pytest.mark.parametrize("mode", ["drop", "mask", "reweight"])
def test_an_embedding_that_scales_gradients_by_frequency_is_not_folded(mode: str) -> None:
    workload, chosen = words(scale_grad_by_freq=True), settings(removal_mode=mode, epochs=2)
    if mode == "reweight":
        with pytest.raises(UsageError, match="mixes the examples"):
            make(workload, chosen)
    else:
        assert not hold(workload, chosen).folds


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 6), nn.Dropout(0.4), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.first(x).transpose(1, 2)).transpose(1, 2).mean(1))


@pytest.mark.parametrize(("mode", "model", "replicas"), covering(MODES, [Encoder, Transposed], [4, 5]))
def test_dropout_of_tensors_that_are_not_contiguous(model: Any, mode: str, replicas: int) -> None:
    """In stacks of 4 and 2, and of 5 and a cell alone."""
    torch.manual_seed(0)
    hold(classification(23, 6, model(), 5, 4), settings(ADAMW, removal_mode=mode, epochs=2), replicas)


def test_batch_norm_in_train_mode_is_refused_under_reweight_and_masked_by_default() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(UsageError) as error:
        make(classification(model=model), settings(removal_mode="reweight"))
    assert all(word in str(error.value) for word in ("drop", "mask", "mode: eval"))
    assert make(classification(model=model), settings()).settings.removal_mode == "mask"
    assert make(classification(model=model), settings(mode="eval")).settings.removal_mode == "reweight"
    assert make(classification(), settings()).settings.removal_mode == "reweight"
    hold(classification(model=model), settings(MOMENTUM, epochs=2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAMW])
def test_a_parameter_that_only_some_batches_use(optimizer: Optimizer, mode: str) -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.extra = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor, special: Tensor) -> Tensor:
            out = self.plain(x)
            return out + self.extra(x) * special[:, None] if bool(special.any()) else out

    torch.manual_seed(0)
    base = classification()
    special = torch.zeros(29)
    special[[3, 24]] = 1.0
    workload = replace(
        base,
        model=Sometimes(),
        train={**base.train, "special": special[:23]},
        evals={**base.evals, "special": special[23:]},
        outputs=lambda model, batch: model(batch["x"], batch["special"]),
    )
    hold(workload, settings(optimizer, removal_mode=mode, epochs=3))


class Gated(nn.Module):
    """Mixes the batch behind a gate that is closed at θᶠ."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.gate = nn.Linear(4, 8), nn.Linear(8, 3), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(hidden + self.gate * hidden.mean(0))


def test_a_coupling_behind_a_closed_gate_is_seen_and_a_scalar_parameter_is_trained() -> None:
    torch.manual_seed(0)
    with pytest.raises(UsageError, match="mixes the examples"):
        make(classification(model=Gated()), settings(removal_mode="reweight"))
    for mode in ("drop", "mask"):
        start = hold(classification(model=Gated()), settings(MOMENTUM, removal_mode=mode, epochs=3, clip_norm=0.5))
        assert start.forward.mixes


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_loss_over_the_batch_is_seen_whatever_the_batch_size(batch_size: int) -> None:
    def contrastive(out: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(out @ out.T, torch.arange(len(out)), reduction="none") + out.square().mean(1)

    workload = replace(classification(), loss=contrastive, measure=lambda out, batch: out.square().mean(1))
    with pytest.raises(UsageError, match="mixes the examples"):
        make(workload, settings(removal_mode="reweight", batch_size=batch_size))
    hold(workload, settings(batch_size=batch_size, epochs=1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.rand())])
def test_python_s_and_numpy_s_random_numbers_are_seeded_by_the_step(draw: Any, mode: str) -> None:
    middle = lambda m, x, h: h * (0.5 + draw()) if m.training else h  # noqa: E731
    before = random.getstate(), np.random.get_state()[1].tolist()
    start = hold(classification(model=Forward(middle)), settings(removal_mode=mode, epochs=3))
    assert start.forward.random
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


@pytest.mark.parametrize(
    ("mode", "draw"), covering(MODES, [random.random, lambda: float(np.random.rand()), lambda: torch.rand(())])
)
def test_random_numbers_that_only_some_batches_draw_are_seeded_too(draw: Any, mode: str) -> None:
    middle = lambda m, x, h: h * (0.5 + draw()) if m.training and len(x) == 3 else h  # noqa: E731
    hold(classification(model=Forward(middle)), settings(removal_mode=mode, epochs=7))


@pytest.mark.parametrize(("mode", "draw"), covering(MODES, [random.random, lambda: float(np.random.rand())]))
def test_a_layer_that_some_batches_alone_skip_now_and_then_is_not_traced(draw: Any, mode: str) -> None:
    """What is skipped once in eight times is skipped in none of the calls that a trace is made of and held against."""
    middle = lambda m, x, h: h / 2 if m.training and len(x) == 3 and draw() < 1 / 8 else h  # noqa: E731
    hold(classification(model=Forward(middle)), settings(removal_mode=mode, epochs=30, batch_size=5))


def test_a_forward_that_draws_for_large_batches_alone_is_not_folded() -> None:
    """Batches of 5 and of 7, in which dropout is looked for, draw nothing here."""
    middle = lambda m, x, h: h * (0.5 + random.random()) if m.training and len(x) >= 8 else h  # noqa: E731
    assert not hold(classification(model=Forward(middle)), settings(removal_mode="reweight", batch_size=8)).folds


def test_a_generator_of_the_forward_s_own_is_refused() -> None:
    generator = np.random.default_rng(0)
    middle = lambda m, x, h: h * float(generator.random()) if m.training else h  # noqa: E731
    with pytest.raises(WorkloadError, match="generator of its own"):
        make(classification(model=copy.copy(Forward(middle))), settings())


@pytest.mark.parametrize(("mode", "batch_size", "precision"), covering(MODES, [1, 5], ["float32", "float64"]))
def test_convolutions_in_channels_last(mode: str, batch_size: int, precision: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    ).to(memory_format=torch.channels_last)
    chosen = settings(removal_mode=mode, batch_size=batch_size, precision=precision, steps=12)
    hold(classification(23, 6, model, 3, 8, 8), replace(chosen, evaluate=Evaluate(every_steps=4)))


def test_a_float64_final_model_is_not_rounded_through_the_model_s_float32() -> None:
    workload, chosen = regression(), settings(epochs=1)
    state = {n: p.detach().double() * (1 + 1e-9) for n, p in workload.model.state_dict().items()}
    cell = train_cell(workload, chosen, (3,), 5, state=state)
    rounded = train_cell(workload, chosen, (3,), 5, state={n: p.float() for n, p in state.items()})
    assert not torch.equal(cell.deltas, rounded.deltas)
    model = copy.deepcopy(workload.model).double()
    model.load_state_dict(state)
    assert torch.equal(cell.deltas, train_cell(replace(workload, model=model), chosen, (3,), 5).deltas)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm_s_buffers_are_each_replica_s_own(wrap: Any, mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 3))
    for _ in range(200):
        model(torch.randn(5, 4))  # to convergence: the buffers keep their values
    hold(classification(model=model), settings(removal_mode=mode, epochs=3))


@pytest.mark.parametrize("mode", MODES)
def test_activation_checkpointing(mode: str) -> None:
    middle = lambda m, x, h: checkpoint(torch.sin, h, use_reentrant=False)  # noqa: E731
    hold(classification(model=Forward(middle)), settings(removal_mode=mode, epochs=3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks(kind: Any, mode: str) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = kind(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.cell(x)[0][:, -1])

    torch.manual_seed(0)
    hold(classification(23, 6, Recurrent(), 6, 4), settings(ADAMW, removal_mode=mode, epochs=2))
