"""The definition and determinism on a GPU; skipped if there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fimo.workers.definition import train_cell
from fimo.workers.device import deterministic, prepare_environment
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.joined import run_shards
from fimo.workers.proof import prove
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.shard import run_shard
from fimo.workers.stacking.size import measure_stack_size, measure_stacks
from fimo.workers.start import Engine, Start, start_from
from fimo.workers.trial import Case
from tests.workers.problems import Workload, classification, regression, sentences, settings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda", 0)
REMOVALS = [(3,), (4, 9), (17,), (22,)]
SINGLE = [(3,), (9,), (17,), (22,)]
"""Of these batch norm has more than one example in every batch."""
prepare_environment()


def on_gpu(workload: Workload, chosen: FurtherTraining) -> Start:
    dtype = getattr(torch, chosen.precision)
    train, evals = (Examples(s, workload.collate, DEVICE, dtype) for s in (workload.train, workload.evals))
    return start_from(FunctionalModel(workload, device=DEVICE, dtype=dtype), train, evals, chosen)


def normed() -> Workload:
    torch.manual_seed(0)
    # A bias that batch norm takes away again has a gradient of rounding alone, of which Adam makes whole steps.
    return classification(
        model=nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    )


@pytest.mark.parametrize("mode", ["drop", "mask", "reweight"])
@pytest.mark.parametrize("workload", [regression, sentences, normed])
def test_the_gpu_agrees_with_the_reference_on_the_cpu(workload, mode: str) -> None:
    if workload is normed and mode == "reweight":
        pytest.skip("refused for batch norm")
    chosen = settings(Optimizer("sgd", lr=0.02, momentum=0.9), removal_mode=mode, clip_norm=1.0)
    removals = SINGLE if workload is normed else REMOVALS
    with deterministic(DEVICE):
        got = run_shard(on_gpu(workload(), chosen), removals, 5, replicas=3)
    for row, removal in enumerate([*removals, (), ()]):
        cell = train_cell(workload(), chosen, removal, 5)
        deltas, distances = cell.deltas, cell.distances
        torch.testing.assert_close(got.deltas[row], deltas, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got.distances[row], distances, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("replicas", [1, 5])
def test_twice_on_a_gpu_is_bitwise_the_same(replicas: int) -> None:
    workload, chosen = regression(middle=nn.Dropout(0.5)), settings(precision="float32", removal_mode="drop")
    results = []
    for _ in range(2):
        with deterministic(DEVICE):
            results.append(run_shard(on_gpu(workload, chosen), REMOVALS, 5, replicas))
    assert torch.equal(results[0].deltas, results[1].deltas)
    assert results[0].peak_bytes > 0


def test_dropout_masks_are_the_same_stacked_or_not_on_a_gpu() -> None:
    workload, chosen = regression(middle=nn.Dropout(0.5)), settings(removal_mode="drop")
    with deterministic(DEVICE):
        alone, together = (run_shard(on_gpu(workload, chosen), REMOVALS, 5, r).deltas for r in (1, 5))
    torch.testing.assert_close(alone, together, rtol=1e-9, atol=1e-9)


def test_the_stack_size_is_measured_on_a_gpu() -> None:
    with deterministic(DEVICE):
        size, seconds = measure_stack_size(on_gpu(regression(), settings()), 16)
    assert size in seconds


@pytest.mark.parametrize("mode", ["drop", "mask", "reweight"])
@pytest.mark.parametrize("optimizer", [Optimizer("sgd", lr=0.02, momentum=0.9), Optimizer("adamw", lr=0.01)])
@pytest.mark.parametrize("workload", [regression, normed])
def test_launched_steps_have_the_numbers_of_those_that_are_run(workload, optimizer: Optimizer, mode: str) -> None:
    if workload is normed and mode == "reweight":
        pytest.skip("refused for batch norm")
    chosen = settings(optimizer, removal_mode=mode, epochs=9, evaluate=Evaluate(every_epochs=1), clip_norm=1.0)
    with deterministic(DEVICE):
        start, launches = on_gpu(workload(), chosen), []
        record = start.captures
        assert record is not None

        def counted(body):
            launch = record(body)
            return lambda: launches.append(launch())

        removals = SINGLE if workload is normed else REMOVALS
        shards = [(removals, 5), (removals, 6)]
        launched, run = (
            [result for _, some in run_shards(replace(start, captures=how), shards, 10) for result in some]
            for how in (counted, None)
        )
    assert len(launches) > 30
    for one, other in zip(launched, run, strict=True):
        torch.testing.assert_close(one.deltas, other.deltas, rtol=1e-9, atol=1e-9)


def test_a_sweeps_proof_passes_on_a_gpu_with_launched_steps() -> None:
    workload, chosen = regression(), settings(removal_mode="drop", epochs=9)
    with deterministic(DEVICE):
        start = on_gpu(workload, chosen)
        case = Case(workload, None, start.settings, len(start.at_final), DEVICE, REMOVALS, 5, 3, [4])
        verdict = prove(case, start)
    assert (verdict.engine, verdict.path) == (Engine(join=False), "traced, folded and stacked")


def images() -> Workload:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    return classification(23, 6, nn.Sequential(*layers), 2, 4, 4)


@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_replicas_on_streams_have_the_numbers_of_the_definition_recorded_or_not(mode: str) -> None:
    chosen = settings(Optimizer("sgd", lr=0.02, momentum=0.9), removal_mode=mode, epochs=9, clip_norm=1.0)
    with deterministic(DEVICE):
        start, launches = on_gpu(images(), chosen).using(Engine(abreast=True)), []
        record = start.captures
        assert start.abreast
        assert record is not None

        def counted(body):
            launch = record(body)
            return lambda: launches.append(launch())

        launched, run = (run_shard(replace(start, captures=how), REMOVALS, 5, 5) for how in (counted, None))
    # Masked batches are seldom of the same sizes.
    assert len(launches) > (30 if mode == "drop" else 5)
    torch.testing.assert_close(launched.deltas, run.deltas, rtol=1e-9, atol=1e-9)
    for row, removal in enumerate([*REMOVALS, (), ()]):
        plain = train_cell(images(), chosen, removal, 5)
        torch.testing.assert_close(launched.deltas[row], plain.deltas, rtol=1e-9, atol=1e-9)


def test_the_way_of_convolutions_is_measured_on_a_gpu() -> None:
    with deterministic(DEVICE):
        stacks = measure_stacks(on_gpu(images(), settings(removal_mode="drop", epochs=9)), 8)
    assert stacks.replicas in (stacks.by_streams if stacks.abreast else stacks.seconds)
    assert stacks.by_streams


class Attends(nn.Module):
    """Attention without dropout, of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.out(self.layer(x).mean(1))
        return logits


def test_attention_without_dropout_is_trained_in_stacks_on_a_gpu() -> None:
    # torch's own has no backward inside vmap there.
    torch.manual_seed(0)
    workload = classification(23, 6, Attends(), 5, 4)
    chosen = settings(precision="float32", removal_mode="reweight")
    with deterministic(DEVICE):
        got = run_shard(on_gpu(workload, chosen), REMOVALS, 5, 5)
    assert got.replicas == 5


class Reads(nn.Module):
    """Decides by a number of its own, which a recording must be refused before CUDA breaks it off."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if float(self.layer.weight.detach().sum()) < 1e9 else x


def test_what_cannot_be_recorded_leaves_torch_as_it_was() -> None:
    chosen = settings(removal_mode="drop", epochs=9)
    with deterministic(DEVICE):
        run_shard(on_gpu(classification(model=Reads()), chosen), REMOVALS, 5, 1)
        assert torch.cuda.get_sync_debug_mode() == 0
        # The generator and the allocator go on.
        torch.empty(8, device=DEVICE).normal_()
        after = run_shard(on_gpu(regression(), chosen), REMOVALS, 5, 5)
    assert after.deltas.isfinite().all()
