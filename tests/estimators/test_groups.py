"""A group's estimate is the sum of its members', for every estimator; and what it is where it is not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fimo.estimators import REGISTRY, parse
from fimo.workers.definition import attribution
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.workload import Workload
from tests.estimators import problems

GROUPS = [[], [3], [5, 11], [0, 2, 4, 6, 8, 26], list(range(13, 27))]
MEMBERS = [[i] for i in range(27)]
OPTIONS = {"lissa": {"depth": 30}, "lissa_h": {"depth": 20, "scale": 20}, "trak": {"dimension": 12}}
MODES = ["reweight", "mask", "drop"]


def settings(mode: str, steps: int = 4, lr: float = 0.05) -> FurtherTraining:
    evaluate = Evaluate(at_steps=(2, steps))
    return FurtherTraining(
        Optimizer("sgd", lr), 9, steps=steps, removal_mode=mode, evaluate=evaluate, precision="float64"
    )


def estimates(name: str, groups: list[list[int]], further: FurtherTraining) -> torch.Tensor:
    p = problems.classification(n=27, removals=groups, further_training=further, seeds=(0, 1))
    (estimator,) = parse({"name": name, **OPTIONS.get(name, {})})
    return estimator.estimate(p).values


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (name, mode)
        for name in sorted(set(REGISTRY) - {"unrolled"})
        for mode in (MODES if REGISTRY[name]().follows_training() else ["reweight"])
    ],
)
def test_a_group_s_estimate_is_the_sum_of_its_members(name, mode):
    further = settings(mode)
    whole, single = estimates(name, GROUPS, further), estimates(name, MEMBERS, further)
    summed = torch.stack([single[..., group, :].sum(dim=-2) for group in GROUPS], dim=-2)
    assert float(whole.abs().max()) > 0
    torch.testing.assert_close(whole, summed, rtol=1e-6, atol=1e-8 * float(whole.abs().max()))


def test_unrolled_sums_over_a_group_where_the_group_s_loss_is_the_sum_and_only_there():
    """Reweight's change of the loss is Σ over the group; a mean over those that stay is another sum for each group."""
    whole, single = (estimates("unrolled", groups, settings("reweight")) for groups in (GROUPS, MEMBERS))
    summed = torch.stack([single[:, group].sum(dim=1) for group in GROUPS], dim=1)
    torch.testing.assert_close(whole, summed, rtol=1e-10, atol=1e-15)
    whole, single = (estimates("unrolled", groups, settings("mask")) for groups in (GROUPS, MEMBERS))
    summed = torch.stack([single[:, group].sum(dim=1) for group in GROUPS], dim=1)
    assert float((whole - summed)[:, 4].norm()) > 0.05 * float(whole[:, 4].norm())


@pytest.mark.parametrize("mode", MODES)
def test_a_sweep_s_groups_of_several_sizes_are_the_plain_definition_s_and_unrolled_comes_close(mode):
    """Groups of 1, 2 and 6 of 27 in one stack, over three epochs; unrolled is their first-order effect."""
    groups = GROUPS[1:4]
    further = dataclasses.replace(settings(mode), steps=9, evaluate=Evaluate(at_steps=(3, 9)))
    p = problems.classification(n=27, removals=groups, further_training=further, seeds=tuple(range(4)))
    for name, parameter in p.model.module.named_parameters():
        parameter.requires_grad_(name in p.model.params)
    workload = Workload(p.model.module, p.train.tensors, p.evals.tensors, problems.outputs_x, problems.cross_entropy)
    plain = attribution(workload, further, groups, range(4))
    stacked = attribution(workload, further, groups, range(4), stacked=True)
    torch.testing.assert_close(stacked.effects, plain.effects, rtol=1e-7, atol=1e-12)
    (estimator,) = parse("unrolled")
    values, effect = estimator.estimate(p).values.transpose(0, 1), plain.effect
    for group in range(len(groups)):
        assert float((values - effect)[group].norm()) < 0.2 * float(effect[group].norm()), groups[group]
