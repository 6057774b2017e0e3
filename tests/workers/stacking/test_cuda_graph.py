"""How CUDA graphs are asked of torch, whose rules are imitated: no GPU is here to break them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fimo.workers.stacking import captured


class Rules:
    """torch's rules for graphs, as ``CUDAGraph.cpp`` and ``CUDACachingAllocator.cpp`` have them."""

    def __init__(self) -> None:
        self.uses: dict[tuple[int, int], int] = {}
        self.numbers, self.stream, self.mode, self.broken = itertools.count(1), 0, 0, False
        # The GPU that is the current one, and those of the streams.
        self.device, self.of, self.recorded_on = 0, {0: 0}, list[tuple[int, int]]()

    def handle(self) -> int:
        return next(self.numbers)

    @contextlib.contextmanager
    def on(self, stream: int) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextlib.contextmanager
    def at(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device.index
        try:
            yield
        finally:
            self.device = before

    def make_stream(self) -> int:
        self.of[len(self.of)] = self.device
        return len(self.of) - 1

    def set_mode(self, mode: int | str) -> None:
        self.mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)  # type: ignore[arg-type, assignment]

    def wait(self) -> None:
        """What ``.item()`` does."""
        if self.mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        self.broken = True
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> Rules:
    own = Rules()

    class Graph:
        taken: tuple[int, int] | None = None

        def __del__(self) -> None:
            if self.taken is not None:
                own.uses[self.taken] -= 1

        def pool(self) -> int:
            assert self.taken is not None
            return self.taken[1]

        def replay(self) -> None:
            pass

    class Recording:
        def __init__(self, graph: Graph, pool: int | None, stream: int, **_: Any) -> None:
            self.graph, self.stream = graph, stream
            # Each GPU keeps its own account of a pool.
            self.pool = own.of[stream], own.handle() if pool is None else pool

        def __enter__(self) -> None:
            # The stream is not left again if this, or the end, fails.
            self.before, own.stream = own.stream, self.stream
            if own.uses.get(self.pool) == 0:
                raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
            own.uses[self.pool] = own.uses.get(self.pool, 0) + 1
            own.recorded_on.append((own.device, own.of[self.stream]))
            self.graph.taken = self.pool

        def __exit__(self, *_: object) -> None:
            if own.broken:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            own.stream = self.before

    for name, value in {
        "CUDAGraph": Graph,
        "graph": Recording,
        "graph_pool_handle": own.handle,
        "stream": own.on,
        "device": own.at,
        "current_device": lambda: own.device,
        "Stream": own.make_stream,
        "current_stream": lambda: own.stream,
        "get_sync_debug_mode": lambda: own.mode,
        "set_sync_debug_mode": own.set_mode,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(captured, "_shared", {})
    return own


def cuda_graph(body: Callable[[], None], number: int = 0) -> captured.Launch:
    record = captured.recorder_of(torch.device("cuda", number))
    assert record is not None
    return record(body)


def test_a_step_is_recorded_when_all_graphs_before_it_have_gone(rules: Rules) -> None:
    # torch takes no pool of which a tensor lives and no graph: cuBLAS keeps its workspace in the first.
    for _ in range(3):
        launch = cuda_graph(lambda: None)
        del launch
    assert len(rules.uses) == 3


def test_graphs_that_live_together_share_their_memory(rules: Rules) -> None:
    launches = [cuda_graph(lambda: None) for _ in range(3)]
    assert len(launches) == 3
    assert len(rules.uses) == 1


def test_a_body_that_waits_is_refused_before_cuda_breaks_the_recording_off(rules: Rules) -> None:
    # torch's allocator and generator stay as they are in a recording that CUDA broke off.
    with pytest.raises(RuntimeError, match="synchronizing"):
        cuda_graph(rules.wait)
    assert (rules.broken, rules.mode, rules.stream) == (False, 0, 0)


def test_a_recording_that_cannot_be_ended_leaves_the_stream_as_it_was(rules: Rules) -> None:
    def breaks() -> None:
        rules.broken = True

    with pytest.raises(RuntimeError, match="previous error"):
        cuda_graph(breaks)
    assert (rules.mode, rules.stream) == (0, 0)


def test_a_warning_that_is_an_error_leaves_torch_free_to_wait(rules: Rules, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch has set the mode when it warns, once a process, that there is one.
    first = True

    def warns(mode: int | str) -> None:
        nonlocal first
        rules.set_mode(mode)
        if first:
            first = False
            raise UserWarning("Synchronization debug mode is a prototype feature")

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", warns)
    with pytest.raises(UserWarning, match="prototype"):
        cuda_graph(lambda: None)
    assert (rules.mode, rules.stream) == (0, 0)
    cuda_graph(lambda: None)


def test_each_gpu_records_on_a_stream_and_in_memory_of_its_own(rules: Rules) -> None:
    # A worker is given another GPU from task to task: on the first one's stream nothing of the second's is recorded.
    launches = [cuda_graph(lambda: None, number) for number in (0, 1, 0)]
    assert rules.recorded_on == [(0, 0), (1, 1), (0, 0)]
    assert (len(rules.uses), rules.device) == (2, 0)
    del launches
