"""Estimators, and a shard, on a device that is not the CPU: nothing is left behind, and the numbers are the same."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from torch import nn

from fimo.estimators import REGISTRY, Problem, parse
from fimo.workers import further_training, start
from fimo.workers.device import deterministic
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.shard import run_shard
from fimo.workers.workload import Workload
from tests.estimators import problems
from tests.estimators.test_determined import SMALL, TRAINING
from tests.support import numbered_gpu, pretend_gpu
from tests.workers.problems import regression, sentences, settings
from tests.workers.stacking import test_text

OPTIONS = {"ekfac": [{}, {"fisher": "sampled"}], "trak": [{}, {"projection": "sparse"}]}
CASES = [(name, options) for name in sorted(REGISTRY) for options in OPTIONS.get(name, [{}])]


def placed(workload: Workload, device: torch.device) -> tuple[FunctionalModel, Examples, Examples]:
    train, evals = (Examples(s, workload.collate, device, torch.float64) for s in (workload.train, workload.evals))
    return FunctionalModel(workload, device=device, dtype=torch.float64), train, evals


def values_of(name: str, options: dict[str, object], device: torch.device) -> torch.Tensor:
    with mock.patch.object(problems, "problem", side_effect=problems.problem) as made:
        problems.classification()
    (estimator,) = parse({"name": name, **SMALL.get(name, {}), **options})
    chosen = dataclasses.replace(TRAINING, removal_mode="reweight")
    given = Problem(*placed(made.call_args.args[0], device), [[0], [1, 2, 3]], further_training=chosen, seeds=(0,))
    found: torch.Tensor = estimator.estimate(given).values
    return found


@pytest.mark.parametrize(("name", "options"), CASES)
def test_an_estimators_values_are_the_cpus(name: str, options: dict[str, object]) -> None:
    with numbered_gpu.gpu() as device:
        there = values_of(name, options, device)
    assert type(there) is torch.Tensor
    expected = values_of(name, options, torch.device("cpu"))
    # Of how many runs are trained together a clock decides, which rounds otherwise.
    torch.testing.assert_close(there, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "options"), CASES)
def test_on_a_gpu_that_is_there_they_are_too_but_for_rounding(name: str, options: dict[str, object]) -> None:
    device = torch.device("cuda", 0)
    with deterministic(device):
        there = values_of(name, options, device)
    expected = values_of(name, options, torch.device("cpu"))
    torch.testing.assert_close(there, expected, rtol=1e-5, atol=1e-7 * float(expected.abs().max()))


@pytest.mark.parametrize("mode", ["drop", "mask", "reweight"])
@pytest.mark.parametrize("workload", [regression, sentences, lambda: regression(middle=nn.Dropout(0.5))])
def test_a_shards_deltas_are_the_cpus(workload, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nesterov = Optimizer("sgd", 0.02, momentum=0.9, nesterov=True)
    chosen: FurtherTraining = settings(
        nesterov, removal_mode=mode, clip_norm=1.0, epochs=2, evaluate=Evaluate(every_epochs=1)
    )
    for module in (further_training, start):
        monkeypatch.setattr(module, "is_gpu", lambda _: True)

    def deltas(device: torch.device) -> torch.Tensor:
        began = start.start_from(*placed(workload(), device), chosen)
        return run_shard(began, [(3,), (4, 9), (17,)], 5, 3).deltas

    with numbered_gpu.gpu() as device:
        there = deltas(device)
    assert type(there) is torch.Tensor
    torch.testing.assert_close(there, deltas(torch.device("cpu")), rtol=1e-12, atol=1e-12)


class Reader(nn.Module):
    """The mean of a sentence's words, some of whose numbers are dropped."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.dropout, self.classes = nn.Embedding(20, 6), nn.Dropout(0.3), nn.Linear(6, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
        mask = attention_mask[..., None].to(self.words.weight.dtype)
        mean = (self.dropout(self.words(input_ids)) * mask).sum(1) / mask.sum(1)
        return type("Out", (), {"logits": self.classes(mean)})


@pytest.mark.parametrize("mode", ["drop", "reweight"])
def test_the_host_waits_for_no_step_of_cut_sentences_with_dropout(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test_text.cheap_parts(monkeypatch)
    for module in (further_training, start):
        monkeypatch.setattr(module, "is_gpu", lambda _: True)
    with numbered_gpu.gpu() as device:
        began = start.start_from(*placed(test_text.text(Reader()), device), test_text.chosen(mode))
        assert began.trimming is not None
        assert began.calls
        training = further_training.Training(began, [(), (3,), (4, 9)], 5)
        with numbered_gpu.NoWaits():
            training.advance()
        training.result()


def test_what_is_waited_for_is_seen() -> None:
    with numbered_gpu.gpu() as device, numbered_gpu.NoWaits():
        x = torch.ones(3).to(device, non_blocking=True)
        for wait in (
            lambda: torch.ones(3).to(device),
            x.cpu,
            lambda: float(x.sum()),
            lambda: x[x > 0],
            lambda: x[torch.tensor([0, 2])],
        ):
            with pytest.raises(pretend_gpu.Waits):
                wait()


def test_what_is_left_behind_is_seen() -> None:
    with numbered_gpu.gpu() as device:
        x = torch.ones(3).to(device)
        assert float((x * 2 + torch.tensor(1.0)).sum()) == 9
        assert x[torch.tensor([0, 2])].cpu().tolist() == [1, 1]
        with pytest.raises(numbered_gpu.MixedError):
            x + torch.ones(3)
