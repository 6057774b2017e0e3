"""The baseline that the linearisation follows is the sweep's own."""

from __future__ import annotations

import torch

from fimo.estimators.operators import trajectory
from fimo.workers.further_training import further_train
from fimo.workers.start import start_from
from tests.estimators import problems
from tests.estimators.test_unrolled import settings_for


def test_it_follows_the_sweeps_own_baseline():
    p = problems.classification(further_training=settings_for("adamw", clip_norm=0.2), seeds=(3,))
    seen = {}
    whole = start_from(p.model, p.train, p.evals, p.further_training)
    further_train(
        whole, [()], 3, watch=lambda s, params: seen.update({s: {n: t[0].clone() for n, t in params.items()}})
    )
    path = trajectory.Trajectory(p.model, p.train, p.further_training, [], 3)
    point = path.start()
    for step in path.steps():
        point = path.advance(point, step)
        for name, tensor in path.layout.tensors(point.params).items():
            if "pooler" not in name:  # torch's optimizers skip what has no gradient
                torch.testing.assert_close(tensor, seen[step.number][name], rtol=1e-10, atol=1e-13)
        if step.number == 8:
            break
