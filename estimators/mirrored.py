"""Mirrored further training as an estimator: every training example at once from a run for each evaluation example.

The mathematics, and the training on the sweep's own stacks, are ``fimo.workers.mirror``'s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fimo.estimators.amounts import settings_of
from fimo.estimators.base import finite
from fimo.estimators.counts import Work
from fimo.estimators.declared import shipped as declared
from fimo.estimators.declared.base import JSON
from fimo.estimators.differentiable import CHECKPOINTING, undifferentiable
from fimo.estimators.own_seeds import OwnSeeds
from fimo.estimators.problem import Estimate, Problem
from fimo.workers.errors import WorkloadError
from fimo.workers.forward import Forward, observe
from fimo.workers.mirror import train_mirrored, why_not
from fimo.workers.settings import FurtherTraining
from fimo.workers.stacking import probe
from fimo.workers.start import Start, start_from


@dataclass(frozen=True)
class Mirrored(declared.Mirrored, OwnSeeds):
    """Train on from θᶠ with g(z)/n subtracted from every step's loss; read the losses of training examples.

    An estimate for each recorded step, in units of g. It trains as reweight does, whatever the sweep's removal mode.

    Its systematic error is of first order: g's gradient is taken along the run, where a* takes it at its end. It shows
    where a gradient turns soon after θᶠ. Measured on Energy (SGD .03, 4 seeds, three final models): mean cosines of
    .73 to .92 at step 6 (the median example's .96 to 1.0, a few of opposite sign), of .97 to .99 at step 30.

    Cost: a run for each evaluation example and seed, and one more for each seed and block of evaluation examples.
    """

    def unsuited(self, problem: Problem) -> str | None:
        """Nothing to follow, a training forward that mixes examples or writes to buffers, or a measure without a
        gradient."""
        reason = super().unsuited(problem)
        if reason is not None or problem.further_training is None:
            return reason
        try:
            forward = _forward(problem, problem.further_training)
        except WorkloadError as error:
            return str(error)
        # A checkpoint is computed again with other parameters than those of the run. Nothing else that other estimators
        # cannot differentiate keeps a model from being trained.
        checkpointed = undifferentiable(problem) == CHECKPOINTING
        return CHECKPOINTING if checkpointed else why_not(problem.model, forward, problem.evals)

    def work(self, problem: Problem) -> Work:
        """A run for each evaluation example and the baseline, and the losses read at every recorded step."""
        steps, settings = self.wanted_steps(problem), settings_of(self, problem)
        read = len({index for removal in problem.removals for index in removal}) * len(steps)
        runs = len(problem.seeds) * (len(problem.evals) + 1)
        # Losses are read forwards alone and in large blocks: as a fraction of a step's batch.
        trained = runs * (steps[-1] + read / (4 * settings.batch_size))
        return Work(steps=trained, bytes=8.0 * len(problem.evals) * len(steps) * len(problem.removals))

    def estimate(self, problem: Problem) -> Estimate:
        """(steps, R, E).

        Raises:
            UsageError, WorkloadError, DivergedError: see ``unsuited`` and ``fimo.workers.mirror.train_mirrored``.
        """
        self.refuse_unsuited(problem)
        steps, seeds = self.wanted_steps(problem), list(problem.seeds)[: self.seeds]
        start, replicas = _start(problem), problem.replicas
        total = torch.zeros(len(steps), len(problem.removals), len(problem.evals), dtype=torch.float64)
        for number, seed in enumerate(seeds, start=1):
            run = train_mirrored(start, problem.evals, problem.removals, seed, steps, replicas)
            # The next seed begins with what fitted.
            total, replicas = total + run.values, run.replicas
            problem.say(f"mirrored: seed {number} of {len(seeds)} done")
        notes: dict[str, JSON] = {"seeds": seeds, "replicas": replicas}
        return Estimate(finite(total / len(seeds), self.name), steps, notes)


def _forward(problem: Problem, settings: FurtherTraining) -> Forward:
    """How the training forward behaves: as the sweep has seen it, or looked at here."""
    if problem.start is not None:
        return problem.start.forward
    model, train = problem.model, problem.train
    return observe(model, probe.shortest(train, probe.proven_cuts(model, train), settings), settings)


def _start(problem: Problem) -> Start:
    """What the sweep's cells share, or the same made here."""
    if problem.start is not None:
        return problem.start
    assert problem.further_training is not None
    settings = replace(problem.further_training, removal_mode="reweight")
    return start_from(problem.model, problem.train, problem.evals, settings)
