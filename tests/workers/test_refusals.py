"""What cannot be trained further is refused up front, in one line that says what to do; the model stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fimo.workers.device import deterministic, pick_device
from fimo.workers.errors import DivergedError, FimoError, UsageError, WorkloadError
from fimo.workers.further_training import further_train
from fimo.workers.shard import run_shard
from fimo.workers.workload import Workload
from tests.workers.problems import classification, make, regression, sentences, settings


def one_line(error: pytest.ExceptionInfo[FimoError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_scalar_loss() -> None:
    workload = replace(regression(), loss=lambda outputs, batch: ((outputs - batch["y"]) ** 2).mean())
    with pytest.raises(WorkloadError) as error:
        make(workload, settings())
    assert "loss must return one value per example, shape (5,), got ()" in one_line(error)
    assert "reduction='none'" in one_line(error)


def test_a_loss_that_broadcasts_predictions_against_labels() -> None:
    workload = replace(regression(), outputs=lambda model, batch: model(batch["x"]))
    with pytest.raises(WorkloadError, match=r"shape \(5,\), got \(5, 5\)"):
        make(workload, settings())


def test_a_scalar_measure() -> None:
    workload = replace(classification(), measure=lambda outputs, batch: outputs.mean())
    with pytest.raises(WorkloadError, match=r"measure must return one value per example, shape \(6,\)"):
        make(workload, settings())


def test_a_measure_may_read_what_training_examples_lack() -> None:
    workload = classification()
    workload.evals["weight"] = torch.ones(6)
    measured = replace(workload, measure=lambda outputs, batch: outputs[:, 0] * batch["weight"])
    assert make(measured, settings()).at_final.shape == (6,)


@pytest.mark.parametrize("key", ["label", "nothing"])
def test_a_loss_that_fails(key: str) -> None:
    workload = replace(regression(), loss=lambda outputs, batch: outputs - batch[key])
    with pytest.raises(WorkloadError, match="loss fails on a batch: KeyError"):
        make(workload, settings())


def test_outputs_that_ignore_the_model_they_are_given() -> None:
    other = torch.nn.Linear(4, 1)
    workload = replace(regression(), outputs=lambda model, batch: other(batch["x"]).squeeze(-1))
    with pytest.raises(WorkloadError, match="depends on no trainable parameter"):
        make(workload, settings(precision="float32"))


def test_a_loss_that_is_not_finite_at_the_final_model() -> None:
    workload = regression()
    workload.train["y"][[17, 21]] = torch.nan
    with pytest.raises(DivergedError) as error:
        make(workload, settings())
    assert "loss of training example 17 (and of 1 more) is nan at the final model" in one_line(error)


def test_a_measure_that_is_not_finite_at_the_final_model() -> None:
    workload = regression()
    workload.evals["x"][2] = torch.inf
    with pytest.raises(DivergedError) as error:
        make(workload, settings())
    assert "measure of evaluation example 2 is" in one_line(error)


class Middle(torch.nn.Sequential):
    """Two layers and something done between them by the test."""

    def __init__(self, middle: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
        self.middle = middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[1](self.middle(self, self[0](x)))


@pytest.mark.parametrize("evals", [6, 129])
def test_a_measure_that_draws_random_numbers(evals: int) -> None:
    """No seed reaches it: its noise would be in every effect, and in what a proof grants to rounding."""
    size = 6 if evals == 6 else 1  # in the last block alone
    drops = Middle(lambda m, h: torch.nn.functional.dropout(h, 0.3, training=m.training or len(h) == size))
    with pytest.raises(WorkloadError, match="measure gives other numbers for the same parameters") as error:
        make(classification(evals=evals, model=drops), settings())
    assert "training=self.training" in one_line(error)


def test_a_measure_that_draws_what_it_does_not_use_is_welcome() -> None:
    make(classification(model=Middle(lambda m, h: h if torch.rand(()) < 2 else -h)), settings())


@pytest.mark.parametrize("random", [False, True])
def test_a_loss_over_large_batches_alone_is_found(random: bool) -> None:
    large = Middle(
        lambda m, h: torch.nn.functional.dropout(
            h - h.mean(0) if m.training and len(h) >= 20 else h, 0.2 if random else 0.0, m.training
        )
    )
    assert make(classification(60, model=large), settings(batch_size=24)).settings.removal_mode == "mask"
    with pytest.raises(UsageError, match="mixes the examples"):
        make(classification(60, model=large), settings(batch_size=24, removal_mode="reweight"))


@pytest.mark.parametrize("first", [0, 4, 9])
def test_a_loss_over_pairs_of_a_batch_is_found_wherever_they_are(first: int) -> None:
    """As of examples of one user, the first and the last of which have no other."""
    workload = classification(60)
    user = torch.arange(60)
    user[first + 6] = first

    def pairs(outputs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        same = batch["user"][:, None] == batch["user"]
        return ((outputs[:, None] - outputs) ** 2).sum(-1).mul(same).sum(1) + outputs.square().sum(1)

    workload = replace(workload, train={**workload.train, "user": user}, loss=pairs)
    assert make(workload, settings()).forward.mixes
    assert not make(replace(workload, train={**workload.train, "user": torch.arange(60)}), settings()).forward.mixes


def test_what_a_copy_would_lose() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    model[0].weight.register_hook(lambda grad: 0 * grad)
    with pytest.raises(WorkloadError, match=r"'0.weight' has a hook on its gradient") as error:
        make(classification(model=model), settings())
    one_line(error)
    for register in (torch.nn.Module.register_parameter, torch.nn.Module.register_buffer):
        model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        register(model, "phase", torch.nn.Parameter(torch.ones(3, dtype=torch.complex64)))
        with pytest.raises(WorkloadError, match="'phase' is complex"):
            make(classification(model=model), settings())
    with pytest.raises(WorkloadError, match="TorchScript"):
        make(classification(model=torch.jit.script(torch.nn.Linear(4, 3))), settings())


def test_a_forward_that_fails_in_train_mode_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
    with pytest.raises(
        WorkloadError, match="fails in train mode on a batch: ValueError: Expected more than 1"
    ) as error:
        make(classification(model=model), settings(batch_size=1, removal_mode="drop"))
    one_line(error)


def test_a_loss_that_grad_cannot_enter() -> None:
    again = Middle(lambda m, h: checkpoint(torch.sin, h, use_reentrant=True))
    with pytest.raises(WorkloadError, match="no gradient that can be taken") as error:
        make(classification(model=again), settings())
    assert "use_reentrant=False" in one_line(error)


def test_a_model_with_nothing_to_train() -> None:
    workload = regression()
    workload.model.requires_grad_(False)
    with pytest.raises(WorkloadError, match="no trainable parameter"):
        make(workload, settings())


@pytest.mark.parametrize(
    ("removal", "says"),
    [
        ((3, 3), "twice"),
        ((23,), "training index 23, but the indices run from 0 to 22"),
        ((-1,), "training index -1"),
        (tuple(range(23)), "leaves no training example"),
    ],
)
@pytest.mark.parametrize("mode", ["drop", "mask", "reweight"])
def test_removals_that_are_not_sets_of_training_indices(removal, says: str, mode: str) -> None:
    with pytest.raises(UsageError, match=says):
        further_train(make(regression(), settings(removal_mode=mode)), [(), removal], 0)


class Fails(torch.nn.Module):
    """Fails in training, after a few steps."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.calls = torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        if self.calls > 9:
            raise RuntimeError("a fault of the model's own")
        return self.norm(self.linear(x))


def _state(workload: Workload) -> tuple[dict[str, torch.Tensor], dict[str, bool], dict[str, bool]]:
    modes = {n: m.training for n, m in workload.model.named_modules()}
    grads = {n: p.requires_grad for n, p in workload.model.named_parameters()}
    return copy.deepcopy(workload.model.state_dict()), modes, grads


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_the_users_model_is_never_touched(fails: bool, training: bool) -> None:
    good = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5))
    workload = classification(model=Fails() if fails else good)
    workload.model.train(training)
    next(workload.model.children()).eval()
    before = _state(workload)
    start = make(workload, settings(removal_mode="drop", clip_norm=1.0))
    if fails:
        with pytest.raises(RuntimeError, match="a fault of the model's own"):
            run_shard(start, [(1,), (2,)], 0, replicas=3)
    else:
        run_shard(start, [(1,), (2,)], 0, replicas=3)
    after = _state(workload)
    assert before[1:] == after[1:]
    assert all(torch.equal(before[0][n], after[0][n]) for n in before[0])
    assert all(p.grad is None for p in workload.model.parameters())
    assert not any(m.training for m in start.model.module.modules())


def test_the_problem_can_be_used_again_after_an_error() -> None:
    start = make(regression(middle=torch.nn.Dropout(0.5)), settings())
    first = further_train(start, [(), (3,)], 0).deltas

    def interrupt(step: int, params: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        further_train(start, [(), (4,)], 1, watch=interrupt)
    assert torch.equal(further_train(start, [(), (3,)], 0).deltas, first)


def _global_state() -> tuple[object, ...]:
    return (
        torch.random.get_rng_state().tolist(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("fails", [False, True])
def test_torchs_global_state_is_restored(fails: bool) -> None:
    torch.manual_seed(99)
    before = _global_state()
    try:
        with deterministic(torch.device("cpu")) as flags:
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.get_float32_matmul_precision() == "highest"
            assert flags["deterministic_algorithms"] is True
            run_shard(make(regression(middle=torch.nn.Dropout(0.5)), settings()), [(1,)], 0, 2)
            if fails:
                raise DivergedError("in the body")
    except DivergedError:
        assert fails
    assert _global_state() == before


def test_preparing_a_problem_draws_nothing_from_the_users_random_state() -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    make(sentences(), settings())
    torch.manual_seed(99)
    workload = regression(middle=torch.nn.Dropout(0.5))
    torch.manual_seed(99)
    make(workload, settings())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_a_gpu_the_cpu_is_picked() -> None:
    assert pick_device(0).type == "cpu"
    assert pick_device(1).type == ("cuda" if torch.cuda.is_available() else "cpu")
