"""What cannot be trained further is refused up front, in one line that says what to do; the model stays as it was."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
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
    assert {n: m.training for n, m in start.model.module.named_modules()} == before[1]


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
