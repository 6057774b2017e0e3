"""``further_train`` against the definition: one run at a time with torch's own modules, optimizers and samplers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fimo.workers import further_training
from fimo.workers.amounts import amounts
from fimo.workers.batches import orders
from fimo.workers.definition import train_cell
from fimo.workers.further_training import further_train
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.workload import Workload
from tests.workers.problems import classification, every_step, make, regression, sentences, settings

MODES = ["drop", "mask", "reweight"]
GROUPS = [(), (3,), (4, 9, 20), (17,), (0, 1, 2, 5, 6, 7, 8)]
OPTIMIZERS = {
    "sgd": Optimizer("sgd", lr=0.05),
    "momentum": Optimizer("sgd", lr=0.02, momentum=0.9),
    "nesterov": Optimizer("sgd", lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.1),
    "dampening": Optimizer("sgd", lr=0.05, momentum=0.8, dampening=0.3, weight_decay=0.01),
    "adam": Optimizer("adam", lr=0.01, weight_decay=0.05),
    "adam, own betas": Optimizer("adam", lr=0.01, betas=(0.8, 0.95), eps=1e-4),
    "adamw": Optimizer("adamw", lr=0.01, weight_decay=0.1),
    "amsgrad": Optimizer("adamw", lr=0.01, weight_decay=0.1, amsgrad=True),
    "adam amsgrad": Optimizer("adam", lr=0.01, amsgrad=True),
}


def hold(workload: Workload, chosen: FurtherTraining, lanes: list[tuple[int, ...]], seed: int = 5) -> None:
    """The stack's deltas and distances equal the definition's, lane by lane and step by step."""
    start = make(workload, chosen)
    got = further_train(start, lanes, seed)
    tight = {"float64": 1e-11, "float32": 2e-6}[chosen.precision]
    for lane, removal in enumerate(lanes):
        cell = train_cell(workload, chosen, removal, seed)
        assert cell.deltas.abs().max() > 1e-3, "a run that does not move shows nothing"
        torch.testing.assert_close(got.deltas[lane], cell.deltas, rtol=tight, atol=tight)
        torch.testing.assert_close(got.distances[lane], cell.distances, rtol=tight, atol=tight)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_is_torchs_own(optimizer: str, mode: str) -> None:
    chosen = settings(OPTIMIZERS[optimizer], removal_mode=mode, steps=12, evaluate=every_step(12))
    hold(regression(), chosen, [(), (3,), (17,), (22,)])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_form_that_a_gpu_steps_by_is_torchs_own_too(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(further_training, "is_gpu", lambda _: True)
    chosen = settings(OPTIMIZERS[optimizer], removal_mode="reweight", steps=12, evaluate=every_step(12))
    hold(regression(), chosen, [(), (3,), (17,), (22,)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_clipping_is_each_replicas_own(optimizer: str, mode: str) -> None:
    loose = settings(OPTIMIZERS[optimizer], removal_mode=mode, clip_norm=0.7, evaluate=Evaluate(every_steps=2))
    hold(regression(), loose, [(), (3,), (17,), (22,)])


def test_clipping_changes_the_run() -> None:
    lanes = [(), (3,)]
    free, clipped = (
        further_train(make(regression(), settings(clip_norm=norm)), lanes, 5).deltas for norm in (None, 0.7)
    )
    assert (free - clipped).abs().max() > 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("workload", [regression, classification, sentences])
def test_every_kind_of_data_in_both_precisions(workload, precision: str, mode: str) -> None:
    """Regression, integer labels with a measure of their own, ragged sentences of a dataset with a collate."""
    lanes = [(), (3,), (17,), (22,)]
    hold(workload(), settings(precision=precision, removal_mode=mode, clip_norm=2.0), lanes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workload", [regression, sentences])
def test_groups_of_different_sizes_in_one_stack(workload, mode: str) -> None:
    hold(workload(), settings(removal_mode=mode, epochs=4), GROUPS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("length", "evaluate"),
    [
        ({"epochs": 4}, Evaluate(every_epochs=1)),
        ({"epochs": 5}, Evaluate(every_epochs=2)),
        ({"epochs": 3}, Evaluate(every_steps=4)),
        ({"epochs": 3}, Evaluate(at_steps=(1, 7))),
        ({"steps": 13}, Evaluate(every_epochs=1)),
        ({"steps": 13}, Evaluate(every_steps=5)),
        ({"steps": 13}, Evaluate(at_steps=(6, 11))),
    ],
)
def test_epochs_steps_and_every_form_of_evaluate(length, evaluate: Evaluate, mode: str) -> None:
    hold(regression(), settings(removal_mode=mode, evaluate=evaluate, **length), [(), (3,), (4, 9, 20)])


@pytest.mark.parametrize("workload", [regression, sentences])
def test_leaving_one_out_that_shortens_the_epoch_by_a_batch(workload) -> None:
    """21 examples in batches of 5: without one of them an epoch has 4 steps instead of 5."""
    chosen = settings(epochs=4, removal_mode="drop", evaluate=Evaluate(every_epochs=1))
    assert amounts(21, (3,), chosen) == [(4, 5), (8, 10), (12, 15), (16, 20)]
    hold(workload(21), chosen, [(), (3,), (20,), (1, 2)])
    hold(workload(21), replace(chosen, evaluate=Evaluate(every_steps=3)), [(), (3,), (20,), (1, 2)])


def test_a_batch_that_is_all_masked_is_a_step_of_zero_gradient() -> None:
    """Momentum and weight decay go on; the batch is not skipped and not NaN."""
    removal = tuple(next(orders(23, 5))[5:10].tolist())
    optimizer = Optimizer("sgd", lr=0.02, momentum=0.9, weight_decay=0.1)
    hold(regression(), settings(optimizer, removal_mode="mask", steps=6, evaluate=every_step(6)), [(), removal])


class TwoBiases(torch.nn.Module):
    """Autograd hands ``a + b`` one tensor for both gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3, bias=False)
        self.a, self.b = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + (self.a + self.b)


@pytest.mark.parametrize("by_gpu", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_two_parameters_that_share_a_gradient_have_their_own_momentum(
    by_gpu: bool, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's form for a GPU adds Nesterov's momentum to the gradients in place: to one tensor twice."""
    monkeypatch.setattr(further_training, "is_gpu", lambda _: by_gpu)
    nesterov = Optimizer("sgd", lr=0.02, momentum=0.9, nesterov=True, weight_decay=decay)
    chosen = settings(nesterov, removal_mode="reweight", steps=12, evaluate=every_step(12))
    hold(classification(model=TwoBiases()), chosen, [(), (3,), (4, 9)])


def test_two_parameters_that_share_a_gradient_are_clipped_once() -> None:
    """Scaling it in place would scale it twice."""
    for mode in MODES:
        hold(classification(model=TwoBiases()), settings(clip_norm=0.1, removal_mode=mode), [(), (3,), (4, 9)])


def test_frozen_parameters_stay_and_unused_ones_do_not_decay() -> None:
    """torch skips a parameter whose gradient is None: no weight decay, no momentum."""

    class Partly(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.unused = (torch.nn.Linear(4, w) for w in (4, 3, 2))
            self.first.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.first(x)))

    workload = classification(model=Partly())
    chosen = settings(OPTIMIZERS["adamw"], removal_mode="drop")
    hold(workload, chosen, [(), (3,)])
    seen = {}
    start = make(workload, chosen)
    further_train(start, [(), (3,)], 5, watch=lambda step, params: seen.update(params))
    assert set(seen) == {"last.weight", "last.bias", "unused.weight", "unused.bias"}
    assert torch.equal(seen["unused.weight"][0], start.model.params["unused.weight"])


def test_tied_weights_are_one_parameter() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode, self.out = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)
            self.decode.weight = self.encode.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.decode(torch.tanh(self.encode(x))))

    hold(classification(model=Tied()), settings(clip_norm=0.5, removal_mode="drop"), [(), (3,)])


@pytest.mark.parametrize("mode", MODES)
def test_convolutions(mode: str) -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(36, 3)
    )
    hold(classification(23, 6, model, 1, 8, 8), settings(removal_mode=mode, steps=7), [(), (3,), (17,)])


def test_batches_are_in_the_order_of_torchs_sampler_over_the_epochs() -> None:
    """Another seed gives another run: the reference would not agree by accident."""
    start = make(regression(), settings())
    one, other = (further_train(start, [()], seed).deltas for seed in (5, 6))
    assert (one - other).abs().max() > 1e-4
