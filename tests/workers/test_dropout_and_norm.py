"""Randomness and state inside the model: dropout masks, batch-norm statistics, buffers of the user's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fimo.workers.definition import train_cell
from fimo.workers.errors import WorkloadError
from fimo.workers.further_training import further_train
from fimo.workers.randomness import kept, seed_all, step_seed
from fimo.workers.settings import Optimizer
from fimo.workers.shard import run_shard
from tests.workers.problems import Encoder, classification, every_step, make, regression, sentences, settings
from tests.workers.test_against_definition import MODES, hold

ADAMW = Optimizer("adamw", lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.parametrize("mode", MODES)
def test_dropout_masks_are_those_of_one_run_alone(mode: str, replicas: int) -> None:
    """Whether stacked or not, with the batch shared or not: a run's masks follow from (seed, step) alone."""
    lanes = [(3,), (), (17,), (22,)][:replicas]
    hold(regression(middle=nn.Dropout(0.5)), settings(ADAMW, removal_mode=mode, clip_norm=1.0), lanes)


@pytest.mark.parametrize("mode", MODES)
def test_dropout_in_groups_and_ragged_sentences(mode: str) -> None:
    workload = sentences()
    workload.model.classes = nn.Sequential(nn.Dropout(0.4), workload.model.classes)
    hold(workload, settings(removal_mode=mode), [(), (3,), (4, 9, 20), (17,)])


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_removal_has_no_effect_under_dropout(mode: str) -> None:
    start = make(regression(middle=nn.Dropout(0.5)), settings(removal_mode=mode, precision="float32"))
    got = run_shard(start, [(1,), (), (2,)], 0, replicas=2)
    assert torch.equal(got.deltas[1], got.deltas[-2])


def test_dropout_differs_between_steps_and_seeds() -> None:
    seeds = {step_seed(seed, step, what) for seed in range(20) for step in range(20) for what in ("batch", "removed")}
    assert len(seeds) == 800
    workload = regression(middle=nn.Dropout(0.5))
    chosen = settings(batch_size=23, steps=2)  # Full batches: the masks are the only randomness.
    one, other = (further_train(make(workload, chosen), [()], seed).deltas for seed in (0, 1))
    assert (one - other).abs().max() > 1e-4


def test_masks_drawn_before_the_first_parameter_are_shared_too() -> None:
    model = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    for mode in MODES:
        hold(classification(model=model), settings(removal_mode=mode), [(), (3,), (17,)])


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_each_replica_has_its_own_batch_norm_statistics_and_is_evaluated_with_them(mode: str, replicas: int) -> None:
    """23 examples in batches of 5: the last batch of 3, of 2 without one of them; masked examples leave the batch."""
    lanes = [(3,), (), (17,), (22,)][:replicas]
    # Not Adam: the bias before batch norm has gradient 0, of which Adam makes rounding noise of size lr.
    momentum = Optimizer("sgd", lr=0.05, momentum=0.9, weight_decay=0.1)
    hold(classification(model=batch_norm()), settings(momentum, removal_mode=mode, evaluate=every_step(15)), lanes)


@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_batch_norm_with_groups_and_dropout(mode: str) -> None:
    model = nn.Sequential(batch_norm(), nn.Dropout(0.3), nn.Linear(3, 3))
    hold(classification(model=model), settings(removal_mode=mode), [(), (3,), (4, 9, 20), (17,)])


@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_convolutions_with_batch_norm(mode: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    hold(classification(23, 6, model, 1, 8, 8), settings(removal_mode=mode, steps=6), [(), (3,), (17,)])


@pytest.mark.parametrize("mode", MODES)
def test_mode_eval_freezes_dropout_and_statistics(mode: str) -> None:
    model = nn.Sequential(batch_norm(), nn.Dropout(0.5), nn.Linear(3, 3))
    workload, chosen = classification(model=model), settings(removal_mode=mode, mode="eval")
    start = make(workload, chosen)
    assert (start.forward.mutable, start.forward.mixes, start.forward.random) == ((), False, False)
    hold(workload, chosen, [(), (3,), (4, 9)])
    assert torch.equal(start.model.fixed["0.1.running_mean"], torch.zeros(8, dtype=torch.float64))


class Counts(nn.Module):
    """Two buffers that training changes and evaluation reads: one in place, one assigned anew."""

    def __init__(self, first_change: int = 0) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))
        self.first_change, self.calls = first_change, 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        if self.training:
            self.calls += 1
            if self.calls > self.first_change:
                self.seen.add_(1)
            self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
        return self.last(hidden - self.mean) / (1 + 0.1 * self.seen)


@pytest.mark.parametrize("replicas", [1, 3])
def test_buffers_of_the_users_own_are_each_replicas(replicas: int) -> None:
    workload = classification(model=Counts())
    assert set(make(workload, settings()).forward.mutable) == {"seen", "mean"}
    hold(workload, settings(removal_mode="drop"), [(3,), (), (17,)][:replicas])


def test_a_buffer_that_changes_only_later_is_refused() -> None:
    """It would be shared between replicas and between runs."""

    class Ragged(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and len(x) < 5:
                self.seen.add_(1)
            return super().forward(x)

    model = Ragged(nn.Linear(4, 3))
    model.register_buffer("seen", torch.zeros(()))
    start = make(classification(model=model), settings(removal_mode="drop"))
    with pytest.raises(WorkloadError, match="'seen' changes during training but not in the first forward"):
        run_shard(start, [(1,), (2,)], 0, replicas=4)


def test_a_forward_that_counts_its_calls_is_refused_however_late_it_minds() -> None:
    """All cells of a worker share the count."""
    for late in (8, 5000):
        with pytest.raises(WorkloadError, match="counts its calls"):
            make(classification(model=Counts(first_change=late)), settings(removal_mode="drop"))


def test_what_the_training_forward_does_is_found_by_running_it() -> None:
    class Centred(nn.Module):
        """Mixes the examples of a batch without being called batch norm."""

        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    def started(model: nn.Module):
        return make(classification(model=model), settings())

    plain = started(nn.Linear(4, 3))
    assert (plain.forward.mutable, plain.forward.mixes, plain.forward.random, plain.folds) == ((), False, False, True)
    normed = started(batch_norm())
    assert set(normed.forward.mutable) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert (normed.forward.mixes, normed.folds) == (True, False)
    dropped = started(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)))
    assert (dropped.forward.mixes, dropped.forward.random, dropped.folds) == (False, True, True)
    centred = started(nn.Sequential(nn.Linear(4, 3), Centred()))
    assert (centred.forward.mixes, centred.folds) == (True, False)


def test_a_masked_example_leaves_a_batch_that_is_mixed_by_other_means_than_batch_norm() -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0) if self.training else x

    model = nn.Sequential(nn.Linear(4, 8), Centred(), nn.Tanh(), nn.Linear(8, 3))
    start = make(classification(model=model), settings(removal_mode="mask", batch_size=23, steps=1))
    masked = further_train(start, [(3,)], 0).deltas
    without = make(classification(model=model), settings(removal_mode="drop", batch_size=23, steps=1))
    torch.testing.assert_close(masked, further_train(without, [(3,)], 0).deltas, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("precision", "optimizer"), [("float64", ADAMW), ("float32", Optimizer("sgd", lr=0.05))])
def test_a_transformer_layer_of_torchs_own_trains_in_eval_mode(precision: str, optimizer: Optimizer) -> None:
    """Its short cut in eval mode rounds otherwise than its operations do."""
    torch.manual_seed(0)
    chosen = settings(optimizer, mode="eval", removal_mode="reweight", precision=precision, steps=6)
    hold(classification(23, 6, Encoder(), 5, 4), chosen, [(), (3,), (17,)])
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_gpu_that_is_trained_on_is_seeded_whichever_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generators = [torch.Generator(), torch.Generator()]
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with kept(torch.device("cpu")):
        seed_all(17, torch.device("cuda", 1))
        assert [g.initial_seed() == 17 for g in generators] == [False, True]
        seed_all(18, torch.device("cuda"))
    assert [g.initial_seed() for g in generators] == [18, 17]


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_padding_has_one_value_in_a_transformer_of_torchs_own_before_and_after_training(precision: str) -> None:
    """Its short cut leaves zeros where padding is: g at θᶠ by it, and afterwards by the operations, makes no delta."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
            self.body, self.out = nn.TransformerEncoder(layer, 1), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            padding = torch.arange(5) > 2 + (x[:, 0, :1] > 0).long()
            return self.out(self.body(x, src_key_padding_mask=padding).mean(1))

    torch.manual_seed(0)
    workload = classification(23, 6, Padded(), 5, 4)
    chosen = settings(Optimizer("sgd", lr=1e-9), removal_mode="reweight", precision=precision, steps=2)
    assert train_cell(workload, chosen, (3,)).deltas.abs().max() < 1e-6
    hold(workload, settings(removal_mode="reweight", precision=precision, steps=6), [(), (3,)])
    assert torch.backends.mha.get_fastpath_enabled()
