"""A step whose kernels are recorded once and launched together: a CUDA graph with static inputs.

Launching a small model's kernels one by one takes the host ten times as long as the GPU takes to compute them. A
recorded step is launched as one.

Invariants: a launch computes what the body computes. A graph freezes whatever Python decided or read when it was
recorded, so that a step's first launches are held against the body itself, run from the same state. Whether a step is
launched follows from the steps before it in the same pass, never from timing. What cannot be recorded is run.

``Start.captures`` is the device's way to record; a test gives one of its own, which needs no GPU.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from fimo.workers.batches import Block
from fimo.workers.forward import close, largest
from fimo.workers.randomness import undrawn, unseeded
from fimo.workers.stacking.read import Read
from fimo.workers.stacking.replay import AFTER

Launch = Callable[[], None]
"""Runs the kernels that were recorded, on the memory that they had then."""

Recorder = Callable[[Callable[[], None]], Launch]
"""Records the kernels of a body that reads no tensor's value; raises whatever the device objects to."""

Body = Callable[[Sequence[Block]], None]
"""A step on blocks whose indices and weights lie on the device. It changes the pass's tensors in place."""

CHECKED = 2
"""Launches of a recorded step that are held against the step itself."""

MOST = 64
"""Steps of a pass that are recorded: batches that are hardly ever alike would fill the device with graphs."""

log = logging.getLogger(__name__)


def recorder_of(device: torch.device) -> Recorder | None:
    """How a device records kernels; None = it does not."""
    return partial(_cuda_graph, device) if device.type == "cuda" else None


@dataclass(frozen=True)
class _Shared:
    """What the graphs of one GPU share.

    Attributes:
        stream: which they are recorded on; torch's own is of the first GPU alone, and records nothing of another's.
        graphs: those that live. All compute in the same memory: none of them leaves anything there for another.
    """

    stream: torch.cuda.Stream
    graphs: WeakSet[Any] = field(default_factory=WeakSet)


_shared: dict[int, _Shared] = {}


def _cuda_graph(device: torch.device, body: Callable[[], None]) -> Launch:
    with torch.cuda.device(device):
        number = torch.cuda.current_device()
        if number not in _shared:
            _shared[number] = _Shared(torch.cuda.Stream())
        return _recorded(_shared[number], body)


def _recorded(shared: _Shared, body: Callable[[], None]) -> Launch:
    graph = torch.cuda.CUDAGraph()
    # Ask a graph that lives for its memory: torch takes no pool again whose graphs have all died.
    other = next(iter(shared.graphs), None)
    pool = None if other is None else other.pool()
    debugged = torch.cuda.get_sync_debug_mode()
    # Come back to this stream even if the recording cannot be ended. Other threads, such as Ray's, may go on.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, pool=pool, stream=shared.stream, capture_error_mode="thread_local"),
    ):
        # Have torch refuse to wait for the device before it tries: a recording that CUDA breaks off leaves torch's
        # allocator and generator as if it went on, and whatever draws later in this process fails.
        try:
            # torch warns when it is first asked to. A program may have made errors of its warnings.
            torch.cuda.set_sync_debug_mode("error")
            body()
        finally:
            torch.cuda.set_sync_debug_mode(debugged)
    shared.graphs.add(graph)
    replay: Launch = graph.replay
    return replay


@dataclass
class _Recorded:
    """A step's launch and the blocks whose memory it reads; ``checked``: launches held against the body so far.

    ``read``: all else that its kernels read, which must live as long.
    """

    launch: Launch
    blocks: Sequence[Block]
    given: list[Tensor]
    read: Read
    checked: int = 0

    def fill(self, blocks: Sequence[Block]) -> None:
        """Put other blocks' numbers where the launch reads them; weights are most often the last step's own."""
        for place, (static, block) in enumerate(zip(self.blocks, blocks, strict=True)):
            static.indices.copy_(block.indices)
            if self.given[place] is not block.weights:
                static.weights.copy_(block.weights)
                self.given[place] = block.weights


class Captured:
    """``body``, launched from the ``AFTER``-th call of each signature on.

    One object serves one pass: the memory that is recorded is that pass's.

    Args:
        body: the step.
        tensors: all that it changes; the same tensors at every call.
        record: None = never record.
        dtype: what the body computes in; its results may be wider, as a measure in float64 of a float32 model is.
    """

    def __init__(
        self,
        body: Body,
        tensors: Callable[[], list[Tensor]],
        record: Recorder | None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.body, self.tensors, self.record, self.dtype = body, tensors, record, dtype
        self.calls: Counter[object] = Counter()
        self._recorded: dict[object, _Recorded | None] = {}

    def __call__(self, blocks: Sequence[Block] = ()) -> None:
        """``body(blocks)``, to be called under ``torch.no_grad``."""
        if self.record is None:
            self.body(blocks)
            return
        key = tuple(_signature(block) for block in blocks)
        self.calls[key] += 1
        if self.calls[key] > AFTER and key not in self._recorded and len(self._recorded) < MOST:
            self._recorded[key] = self._record_or_none(self.record, blocks)
        recorded = self._recorded.get(key)
        if recorded is None:
            self.body(blocks)
        elif recorded.checked < CHECKED:
            recorded.checked += 1
            if not self._launches_as_it_runs(recorded, blocks):
                self._recorded[key] = None
        else:
            recorded.fill(blocks)
            recorded.launch()

    def _record_or_none(self, record: Recorder, blocks: Sequence[Block]) -> _Recorded | None:
        static = [replace(b, indices=b.indices.clone(), weights=b.weights.clone()) for b in blocks]
        before, read = self._copies(), Read()

        def reading() -> None:
            with read:
                self.body(static)

        try:
            # A decision that is drawn on the host would be frozen as it went here.
            with undrawn(torch.device("cpu")), unseeded():
                launch = record(reading)
        except Exception as error:
            # Run it, whatever the device objects to: that always works.
            log.debug("not recorded: %s: %s", type(error).__name__, error)
            return None
        finally:
            self._put(before)
        return _Recorded(launch, static, [block.weights for block in blocks], read)

    def _launches_as_it_runs(self, recorded: _Recorded, blocks: Sequence[Block]) -> bool:
        """Take the step both ways from the same state; go on from what the body gives if they differ."""
        before = self._copies()
        self.body(blocks)
        expected = self._copies()
        self._put(before)
        recorded.fill(blocks)
        recorded.launch()
        if all(_same_step(*three, self.dtype) for three in zip(self.tensors(), expected, before, strict=True)):
            return True
        log.warning("a recorded step does not give what the step gives: it is run, and not launched")
        self._put(expected)
        return False

    def _copies(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self.tensors()]

    def _put(self, copies: list[Tensor]) -> None:
        for tensor, copy in zip(self.tensors(), copies, strict=True):
            tensor.copy_(copy)


def _signature(block: Block) -> object:
    return block.lanes, block.indices.shape, block.weights.shape, block.weights.dtype, block.length


def _same_step(got: Tensor, expected: Tensor, before: Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways to take a step in ``dtype`` changed a tensor alike, relative to the largest change."""
    if not got.is_floating_point():
        return torch.equal(got, expected)
    tolerance = 1e-9 if dtype is torch.float64 else 1e-4
    change = expected - before
    return close(got - before, change, tolerance, largest(change))
