"""How CUDA graphs are asked of torch, whose rules are imitated: no GPU is here to break them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fimo.workers.stacking import captured


class Rules:
    """torch's rules for graphs, as ``CUDAGraph.cpp`` and ``CUDACachingAllocator.cpp`` have them."""

    def __init__(self) -> None:
        self.uses: dict[int, int] = {}
        self.numbers, self.stream, self.mode, self.broken = itertools.count(1), 0, 0, False

    def handle(self) -> int:
        return next(self.numbers)

    @contextlib.contextmanager
    def on(self, stream: int) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

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
        taken: int | None = None

        def __del__(self) -> None:
            if self.taken is not None:
                own.uses[self.taken] -= 1

        def pool(self) -> int:
            assert self.taken is not None
            return self.taken

        def replay(self) -> None:
            pass

    class Recording:
        def __init__(self, graph: Graph, pool: int | None, **_: Any) -> None:
            self.graph, self.pool = graph, own.handle() if pool is None else pool

        def __enter__(self) -> None:
            # The stream is not left again if this, or the end, fails.
            self.before, own.stream = own.stream, 1
            if own.uses.get(self.pool) == 0:
                raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
            own.uses[self.pool] = own.uses.get(self.pool, 0) + 1
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
        "current_stream": lambda: own.stream,
        "get_sync_debug_mode": lambda: own.mode,
        "set_sync_debug_mode": own.set_mode,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return own


def test_a_step_is_recorded_when_all_graphs_before_it_have_gone(rules: Rules) -> None:
    # torch takes no pool of which a tensor lives and no graph: cuBLAS keeps its workspace in the first.
    for _ in range(3):
        launch = captured._cuda_graph(lambda: None)
        del launch
    assert max(rules.uses) == 3


def test_graphs_that_live_together_share_their_memory(rules: Rules) -> None:
    launches = [captured._cuda_graph(lambda: None) for _ in range(3)]
    assert len(launches) == 3
    assert len(rules.uses) == 1


def test_a_body_that_waits_is_refused_before_cuda_breaks_the_recording_off(rules: Rules) -> None:
    # torch's allocator and generator stay as they are in a recording that CUDA broke off.
    with pytest.raises(RuntimeError, match="synchronizing"):
        captured._cuda_graph(rules.wait)
    assert (rules.broken, rules.mode, rules.stream) == (False, 0, 0)


def test_a_recording_that_cannot_be_ended_leaves_the_stream_as_it_was(rules: Rules) -> None:
    def breaks() -> None:
        rules.broken = True

    with pytest.raises(RuntimeError, match="previous error"):
        captured._cuda_graph(breaks)
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
        captured._cuda_graph(lambda: None)
    assert (rules.mode, rules.stream) == (0, 0)
    captured._cuda_graph(lambda: None)
