"""Amount-matched influence by recursion: t steps of SGD on the Gauss-Newton quadratic, without a factorisation.

From x_0 = 0, a step of the sweep's optimizer on −vᵀx + ½xᵀG_s x, G_s the Gauss-Newton matrix of the s-th batch:

    x_{s+1} = x_s − η (G_s x_s − v)    (plain SGD; momentum, Nesterov and weight decay as torch has them),

and â_t = x_tᵀ ∇L_i for each recorded step t. Over full batches this is f_t(G) of ``ekfac_matched`` exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.estimators.amounts import SGDMatched
from fimo.estimators.base import Pair, Pairing
from fimo.estimators.counts import Work, of_curvature
from fimo.estimators.declared import shipped as declared
from fimo.estimators.operators.gradients import dot_products
from fimo.estimators.operators.optimizers import Descent
from fimo.estimators.operators.spaces import MatrixFree, make_curvature, outputs_of
from fimo.estimators.problem import Notes, Problem
from fimo.workers import batches
from fimo.workers.amounts import BASELINE
from fimo.workers.errors import DivergedError, UsageError
from fimo.workers.settings import FurtherTraining

GROWTH = 100
"""How many times longer than a straight descent's an iterate may be before the recursion counts as diverging."""


@dataclass(frozen=True)
class LiSSAMatched(declared.LiSSAMatched, SGDMatched):
    """The recursion over the Gauss-Newton matrices of the sweep's own batches, one estimate per recorded step.

    Cost: t products with the curvature of a batch, for every evaluation gradient.
    """

    def work(self, problem: Problem) -> Work:
        """A product with a batch's curvature at every step."""
        settings, steps = self.followed(problem)
        examples = steps[-1] * settings.batch_size
        outputs = outputs_of(problem.model, problem.train)
        return super().work(problem) + of_curvature(problem, outputs, examples / len(problem.train))

    def pairing(self, problem: Problem, notes: Notes) -> Pairing:
        """(steps, b, k).

        Raises:
            DivergedError: an iterate grows without bound.
        """
        settings, steps = self.followed(problem)
        notes["seed"] = self.seed
        curvature = make_curvature(problem.model, problem.train, "gauss_newton")

        def against(right: Tensor) -> Pair:
            space = curvature.around(right)
            descent, iterates = Descent(settings.optimizer, torch.zeros_like(space.start)), []
            lengths = space.start.norm(dim=1)
            for step, batch in enumerate(_orders(problem, settings, self.seed), start=1):
                descent.step(space.apply(descent.x, batch) - space.start)
                if step in steps:
                    self._refuse_growth(descent.x, lengths, step, settings)
                    iterates.append(descent.x)
                if step == steps[-1]:
                    break
            return lambda left: torch.stack([dot_products(left, space.rows(x)) for x in iterates])

        # A compressed iterate is short; a plain one is a row of all P scalars, kept for each recorded step.
        rows_kept = len(steps) if isinstance(curvature, MatrixFree) else 1
        return Pairing(against, steps=steps, rows_kept=rows_kept)

    def _refuse_growth(self, x: Tensor, lengths: Tensor, step: int, settings: FurtherTraining) -> None:
        grown = float((x.norm(dim=1) / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)).max())
        if not grown <= GROWTH * step * settings.optimizer.lr / (1 - settings.optimizer.momentum):
            raise DivergedError(
                f"{self.name}: the recursion grows without bound by step {step}: the learning rate is too large for "
                "the Gauss-Newton matrix of a batch; use ekfac_matched"
            )


def _orders(problem: Problem, settings: FurtherTraining, seed: int) -> Iterator[list[int]]:
    for blocks in batches.schedule(len(problem.train), [BASELINE], settings, seed):
        if len(blocks) != 1:
            raise UsageError("the baseline has one batch a step")
        yield blocks[0].indices.flatten().tolist()
