"""Unrolled further training: the effect of a removal along the baseline's own trajectory, the loss's gradient linear.

The baseline is θ_{s+1}, m_{s+1} = U_s(θ_s, m_s, ∇L_s(θ_s)), with m the optimizer's state. A removal adds q_s to the
loss of step s (see ``trajectory``). To first order in the change δ_s of θ_s it changes the step's gradient by
∇²L_s(θ_s) δ_s + ∇q_s(θ_s); what the optimizer makes of that is carried along (see ``changes``): as a derivative under
SGD, as a finite change under Adam and AdamW and through clipping. The estimate is ∇g(z, θ_t)ᵀ δ_t / w, with δ_t the
change that the sweep's removal weight w makes: the same for every w if the optimizer is linear, else not.

**forward** carries one δ for each removal. One pass yields every evaluation example at every step.
**adjoint** carries one cotangent for each evaluation example back from a recorded step. One pass yields every removal,
all n training examples if asked for; each recorded step needs its own. It recomputes the baseline from √T checkpoints.
Under unclipped SGD both are the same sum; there is no adjoint of a finite change.

First order is not the whole effect. A ReLU network's gradient jumps when a unit switches, and no derivative shows that
a removal moves the switch. Averaging over seeds reduces the difference; at large amounts a part of it stays. Beyond a
learning rate of 2/sharpness a linear change grows without bound (see ``growth``): the estimate then ends before it.
Sources: Hara et al., Data cleansing for models trained with SGD (2019); Wei et al., arXiv 2412.03906, section 4, for
linearised further training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from fimo.estimators.amounts import settings_of
from fimo.estimators.base import finite
from fimo.estimators.counts import Work
from fimo.estimators.declared import shipped as declared
from fimo.estimators.declared.base import JSON
from fimo.estimators.differentiable import estimating
from fimo.estimators.operators import changes, gradients
from fimo.estimators.operators.changes import Changes
from fimo.estimators.operators.cotangents import Checkpoints, cotangents
from fimo.estimators.operators.gradients import Layout, directional, each_example
from fimo.estimators.operators.trajectory import Trajectory, why_not
from fimo.estimators.own_seeds import OwnSeeds
from fimo.estimators.problem import Estimate, Problem
from fimo.workers.amounts import Removal
from fimo.workers.errors import DivergedError, WorkloadError
from fimo.workers.examples import Batch
from fimo.workers.forward import observe

WATCHED = 4
"""Removals whose changes tell the adjoint whether changes grow."""


@dataclass(frozen=True)
class Unrolled(declared.Unrolled, OwnSeeds):
    """Linearised further training, averaged over seeds: an estimate for each recorded step, in units of g.

    Cost a seed, in Hessian-vector products of a batch: T·R forward; Σ_t t·E over the recorded steps t, and as many
    derivatives of the removals' losses, adjoint.
    """

    def unsuited(self, problem: Problem) -> str | None:
        """There is no further training, or no seed, to follow; no adjoint; or steps that no linearisation follows."""
        settings = problem.further_training
        if settings is not None and self.direction == "adjoint" and changes.is_finite(settings):
            what = "clipped gradients" if settings.optimizer.name == "sgd" else settings.optimizer.name
            return f"direction: adjoint follows unclipped SGD alone, not {what}; leave direction out"
        reason = super().unsuited(problem)
        if reason is not None or settings is None:
            return reason
        try:
            forward = observe(problem.model, problem.train, settings)
        except WorkloadError as error:
            return str(error)
        return why_not(forward, settings, len(problem.train), [tuple(r) for r in problem.removals])

    def work(self, problem: Problem) -> Work:
        """A product with a batch's Hessian for every step and removal, or for every step and evaluation example back
        from each recorded step; and the baseline."""
        settings, steps = settings_of(self, problem), self.wanted_steps(problem)
        examples = len(problem.seeds) * min(settings.batch_size, len(problem.train))
        rows = steps[-1] * len(problem.removals)
        if not self._is_forward(problem, steps):
            rows = sum(steps) * len(problem.evals)
        size = Layout.of(problem.model.params).size
        held = 4.0 * min(gradients.held(problem.model.device), len(problem.removals) * changes.scalars(size, settings))
        return Work(products=examples * rows, passes=examples * steps[-1], bytes=held)

    def estimate(self, problem: Problem) -> Estimate:
        """(steps, R, E): the mean over ``problem.seeds``, the first ``seeds`` of them.

        If changes grow without bound with any of the seeds, only the recorded steps before that are estimated.

        Raises:
            UsageError: no further-training section or seeds, or see ``trajectory.why_not``.
            DivergedError: changes grow without bound before the first recorded step.
        """
        self.refuse_unsuited(problem)
        seeds = list(problem.seeds)[: self.seeds]
        steps = self.wanted_steps(problem)
        forward = self._is_forward(problem, steps)
        along = _forward if forward else _adjoint
        total = torch.zeros(len(steps), len(problem.removals), len(problem.evals), dtype=torch.float64)
        notes: dict[str, JSON] = {"seeds": list(seeds), "direction": "forward" if forward else "adjoint"}
        devices = [problem.model.device] if problem.model.device.type == "cuda" else []
        # Dropout is seeded step by step; the caller's random state must not notice.
        with estimating(problem.model), torch.random.fork_rng(devices=devices):
            for number, seed in enumerate(seeds, start=1):
                values, onset = along(problem, steps, seed)
                if onset is not None:
                    steps, notes["warning"] = _ended(self.name, problem, steps, seed, onset)
                total = total[: len(steps)] + values[: len(steps)]
                problem.say(f"unrolled: seed {number} of {len(seeds)} done")
        weight = settings_of(self, problem).removal_weight
        return Estimate(finite(total / len(seeds) / weight, self.name), steps, notes)

    def _is_forward(self, problem: Problem, steps: Sequence[int]) -> bool:
        assert problem.further_training is not None
        if self.direction != "auto":
            return self.direction == "forward"
        cheaper = steps[-1] * len(problem.removals) <= 2 * sum(steps) * len(problem.evals)
        return cheaper or changes.is_finite(problem.further_training)


def _ended(name: str, problem: Problem, steps: tuple[int, ...], seed: int, onset: int) -> tuple[tuple[int, ...], str]:
    """The steps before ``onset``, and the warning, which is said.

    Raises:
        DivergedError: there are none.
    """
    left = tuple(takewhile(lambda step: step < onset, steps))
    grows = f"from step {onset} on a removal's change grows without bound (seed {seed}), as beyond 2/sharpness"
    if not left:
        raise DivergedError(
            f"{name}: {grows}, and step {steps[0]} is the first recorded: lower the learning rate, or evaluate earlier"
        )
    warning = f"warning: {name}: {grows}; it ends with step {left[-1]}. A lower learning rate would mend it"
    problem.say(warning)
    return left, warning


def _forward(problem: Problem, steps: Sequence[int], seed: int) -> tuple[Tensor, int | None]:
    """(steps, R, E) of one seed by changes, and from which step on they grow; the values end before it.

    As many removals at a time as are ``gradients.held``.
    """
    assert problem.further_training is not None
    values, onset = [torch.zeros(len(steps), 0, len(problem.evals), dtype=torch.float64)], None
    each = changes.scalars(Layout.of(problem.model.params).size, problem.further_training)
    together = max(1, gradients.held(problem.model.device) // each)
    for start in range(0, len(problem.removals), together):
        removals = [tuple(r) for r in problem.removals[start : start + together]]
        rows: list[Tensor] = []
        for along in _carried(problem, steps[-1] if onset is None else onset - 1, seed, removals):
            if along.growth.onset is not None:
                onset = min(along.growth.onset, onset or along.growth.onset)
            elif along.point.number in steps:
                rows.append(_measured(problem, along))
        kept = min(len(rows), *map(len, values)) if onset is None else sum(step < onset for step in steps)
        values = [block[:kept] for block in [*values, torch.stack(rows) if rows else values[0][:0]]]
    return torch.cat(values, dim=1), onset


def _carried(problem: Problem, last: int, seed: int, removals: list[Removal]) -> Iterator[Changes]:
    """The changes of the removals after each step up to ``last``, or up to the one at which they are found to grow."""
    assert problem.further_training is not None
    trajectory = Trajectory(problem.model, problem.train, problem.further_training, removals, seed)
    along = changes.carried(trajectory)
    for step in trajectory.steps():
        if step.number > last or along.growth.onset is not None:
            return
        along.advance(step)
        yield along


def _measured(problem: Problem, along: Changes) -> Tensor:
    """∇g(z, θ_t)ᵀ δ for every evaluation example and change, float64 (R, E) on the CPU."""
    model, layout = problem.model, along.trajectory.layout
    columns, params, moved = [], along.seen.params, along.moved
    for _, batch in problem.evals.batches(gradients.BLOCK):

        def slope(row: Tensor, batch: Batch = batch) -> Tensor:
            return directional(lambda p: model.measure(layout.tensors(p), batch), params, row)[1]

        together = max(1, gradients.stream(model.device) // layout.size)
        columns.append(torch.cat([each_example(slope, part) for part in moved.split(together)]).detach())
    return torch.cat(columns, dim=1).to("cpu", torch.float64)


def _adjoint(problem: Problem, steps: Sequence[int], seed: int) -> tuple[Tensor, int | None]:
    """As ``_forward``, by cotangents; whether changes grow is told by those of a few removals."""
    assert problem.further_training is not None
    removals = [tuple(r) for r in problem.removals]
    changing = [r for r in removals if r]
    onset = _onset(problem, steps[-1], seed, changing) if changing else None
    steps = [step for step in steps if onset is None or step < onset]
    values = torch.zeros(len(steps), len(removals), len(problem.evals), dtype=torch.float64)
    if not steps:
        return values, onset
    trajectory = Trajectory(problem.model, problem.train, problem.further_training, removals, seed)
    checkpoints = Checkpoints(trajectory, steps[-1])
    together = max(1, gradients.held(problem.model.device) // (4 * trajectory.layout.size))
    for place, last in enumerate(steps):
        for start in range(0, len(problem.evals), together):
            columns = range(start, min(start + together, len(problem.evals)))
            found = cotangents(checkpoints, problem.evals, last, columns)
            values[place, :, columns.start : columns.stop] = found
    return values, onset


def _onset(problem: Problem, last: int, seed: int, removals: list[Removal]) -> int | None:
    """From which step on the changes of ``WATCHED`` removals, evenly spread, grow; None = they do not."""
    watched = removals[:: max(1, len(removals) // WATCHED)][:WATCHED]
    onset = None
    for along in _carried(problem, last, seed, watched):
        onset = along.growth.onset
    return onset
