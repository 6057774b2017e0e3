"""A task's GPU: the one that Ray gave it, and no more of its memory than its share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fimo.estimators.counts import Work
from fimo.orchestrator.run import budget, prepared


def given(monkeypatch: pytest.MonkeyPatch, ids: list[str], visible: str | None) -> int:
    import ray

    from fimo.orchestrator.run import pool as driver

    context = SimpleNamespace(get_accelerator_ids=lambda: {"GPU": ids})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    return driver.gpu_number()


@pytest.mark.parametrize(
    ("ids", "visible", "number"),
    [
        ([], None, 0),
        (["3"], None, 3),
        (["3"], "3", 0),
        (["3"], "1,3", 1),
        (["GPU-aa"], "GPU-bb,GPU-aa", 1),
    ],
)
def test_rays_name_of_a_gpu_becomes_torchs_number(
    monkeypatch: pytest.MonkeyPatch, ids: list[str], visible: str | None, number: int
) -> None:
    assert given(monkeypatch, ids, visible) == number


@pytest.mark.parametrize(("gpus", "expected"), [(0.25, [(0.25, 2)]), (1.0, [(1.0, 2)]), (2.0, [(1.0, 2)])])
def test_a_share_of_a_gpu_bounds_the_memory(
    monkeypatch: pytest.MonkeyPatch, gpus: float, expected: list[tuple[float, int]]
) -> None:
    """The calls alone; the next test sees what CUDA does with them, if there is a GPU."""
    bounds: list[Any] = []
    chosen: list[Any] = []
    monkeypatch.setattr(prepared, "pick_device", lambda gpus: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device.index))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: bounds.append((share, device.index))
    )
    assert prepared._device(gpus, 2) == torch.device("cuda", 2)
    assert chosen == [2]
    assert bounds == expected


def test_memory_that_torch_keeps_between_tensors_is_free_for_an_estimator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that has trained large stacks holds most of its GPU, and no estimator is left out for it."""
    gib = 2**30
    about = {"mem_get_info": (10 * gib, 140 * gib), "memory_reserved": 120 * gib, "memory_allocated": 2 * gib}
    for name, value in {**about, "get_per_process_memory_fraction": 1.0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _device, value=value: value)
    gpu = torch.device("cuda", 0)
    assert budget.too_large(Work(bytes=100 * gib), gpu) is None
    assert (
        budget.too_large(Work(bytes=110 * gib), gpu) == "too large: it holds about 110.0 GiB, 128.0 GiB are free here"
    )
    # A share of a GPU bounds what its tasks may take.
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _device: 0.5)
    assert budget.too_large(Work(bytes=100 * gib), gpu) is not None


def test_no_gpu_asked_for_is_the_cpu() -> None:
    assert prepared._device(0.0, 3) == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_than_the_share_is_out_of_memory() -> None:
    device = prepared._device(0.25, 0)
    try:
        total = torch.cuda.get_device_properties(device).total_memory
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(int(0.3 * total), dtype=torch.uint8, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
