"""What counted work costs on a device: each operation is timed once on the problem's own model and device.

An estimate, for a budget and for a plan: right to a factor of 2 or 3, not a promise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch
from torch.func import grad

from fimo.estimators.counts import Work, is_large
from fimo.estimators.differentiable import estimating
from fimo.estimators.operators import gradients
from fimo.estimators.operators.curvature import GaussNewton, Hessian, Operator
from fimo.estimators.operators.gradients import Layout
from fimo.estimators.operators.kronecker import sum_factors
from fimo.estimators.operators.layerwise import layerwise
from fimo.estimators.operators.rows import loss_gradients
from fimo.estimators.problem import Problem
from fimo.workers.device import clock
from fimo.workers.examples import Batch
from fimo.workers.functional import Tensors
from fimo.workers.further_training import Training
from fimo.workers.stacking.replay import Graphs

SOME = 16
"""Examples of a large model that are timed together."""


OPERATIONS = 200
"""Small operations of a solver's iteration."""


def _spread(size: int, count: int) -> list[int]:
    """So many indices, evenly: lengths may follow the order."""
    return [place * size // count for place in range(count)]


class Rates:
    """Seconds of each operation on the problem's model and device, measured when first asked for."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def seconds(self, work: Work) -> float:
        """Device-seconds of some work."""
        total = 0.0
        for count, name in (
            (work.gradients, "gradient"),
            (work.products, "product"),
            (work.gauss, "gauss"),
            (work.passes, "example"),
            (work.steps, "step"),
            (work.flops, "flop"),
            (work.inner, "inner"),
            (work.factors, "factor"),
            (work.draws, "draw"),
            (work.calls, "call"),
        ):
            total += count * getattr(self, name) if count else 0.0
        return total

    @cached_property
    def gradient(self) -> float:
        """One example's gradient."""
        model, train = self._problem.model, self._problem.train

        with estimating(model):
            way = layerwise(model, model.loss, train)
        if way is not None:
            some = SOME if is_large(model) else 4 * SOME
            return self._timed(
                lambda count: list(way.gradients(_spread(len(train), count))), len(train), some, alike=False
            )

        def take(count: int) -> None:
            for _ in loss_gradients(model, train, range(count)):
                pass

        return self._timed(take, len(train), gradients.block_size(Layout.of(model.params).size, model.device))

    @cached_property
    def product(self) -> float:
        """One example's Hessian with one row, many rows at once."""
        return self._product(Hessian(self._problem.model, self._problem.train))

    @cached_property
    def gauss(self) -> float:
        """One example's Gauss-Newton matrix with one row, many rows at once."""
        return self._product(GaussNewton(self._problem.model, self._problem.train))

    def _product(self, operator: Operator) -> float:
        model, train = self._problem.model, self._problem.train
        layout = Layout.of(model.params)
        rows = max(1, min(16, len(self._problem.evals), gradients.stream(model.device) // layout.size))
        some = torch.randn(rows, layout.size, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)
        return self._timed(lambda count: operator(some, range(count)), len(train), 64) / rows

    @cached_property
    def example(self) -> float:
        """One example's part of a batch's gradient."""
        model, train = self._problem.model, self._problem.train

        def mean(params: Tensors, batch: Batch) -> torch.Tensor:
            return model.loss(params, batch).mean()

        return self._timed(lambda count: grad(mean)(model.params, train.batch(range(count))), len(train), 64)

    @cached_property
    def step(self) -> float:
        """One step of one replica, trained with others as the sweep's cells are."""
        start, together = self._problem.start, min(16, self._problem.replicas or 16)
        if start is None:
            settings = self._problem.further_training
            return self.example * (settings.batch_size if settings is not None else 1)
        # What is traced here is kept apart, so that no result depends on its cost having been told.
        own = replace(start, graphs=None if start.graphs is None else Graphs())

        read = clock(start.model.device)

        def once(last: int) -> float:
            training, began = Training(own, [()] * together, 0), read()
            training.advance(last)
            if start.model.device.type == "cuda":
                torch.cuda.synchronize(start.model.device)
            return (read() - began) / training.step / together

        first = once(2)
        if 2 * together * first > 1:
            return first
        # Short steps are traced after a few of them; what more take is the rate.
        once(16)
        return once(32)

    @cached_property
    def flop(self) -> float:
        """One multiplication and addition of a matrix product in float64."""
        return self._flop(torch.float64)

    @cached_property
    def inner(self) -> float:
        """The same in the model's dtype."""
        return self._flop(self._problem.model.dtype)

    def _flop(self, dtype: torch.dtype) -> float:
        side = 512
        square = torch.ones(side, side, dtype=dtype, device=self._problem.model.device)
        return self._timed(lambda count: [square @ square for _ in range(count)], 4, 4) / (2 * side**3)

    @cached_property
    def factor(self) -> float:
        """One example's part of Kronecker factors: half for its activations, half for a vector's slopes."""
        model, train = self._problem.model, self._problem.train
        return (
            self._timed(lambda count: sum_factors(model, train, _spread(len(train), count)), len(train), 4 * SOME) / 2
        )

    @cached_property
    def draw(self) -> float:
        """One random sign, drawn on the CPU."""
        generator = torch.Generator().manual_seed(0)
        return self._timed(lambda count: torch.randint(2, (count,), generator=generator), 2**20, 2**20)

    @cached_property
    def call(self) -> float:
        """What an iteration of a solver takes beside its arithmetic: some dozens of small operations."""
        small = torch.ones(8, 8, dtype=torch.float64, device=self._problem.model.device)
        return self._timed(lambda count: [small @ small for _ in range(OPERATIONS * count)], 10, 10)

    def _timed(self, call: Callable[[int], object], most: int, block: int, alike: bool = True) -> float:
        """Seconds for one of ``count`` things done together: of one if that is long, of a block if it is short.

        Args:
            alike: whether one is like another; if not (sentences have lengths), a block is timed however long one is.
        """
        device, model = self._problem.model.device, self._problem.model
        read = clock(device)

        def once(count: int) -> float:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = read()
            with estimating(model):
                call(count)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return read() - began

        once(1)
        alone = once(1)
        count = min(most, max(1, block))
        if count == 1 or (alike and alone > 0.5):
            return alone
        together = once(count)
        # The first time pays for its memory.
        each = (min(together, once(count)) if together < 0.5 else together) / count
        return min(alone, each) if alike else each
