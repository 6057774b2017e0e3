"""Δθ̂_t(𝒟): where further training on everything moves the parameters, on average over seeds.

The generalised influence function (Wei et al. 2025, Proposition 1) needs it. The baselines are trained again here
rather than kept by every shard: they are two of its many cells, and P scalars a seed and step would outweigh its
results.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from fimo.workers.amounts import BASELINE
from fimo.workers.errors import DivergedError, UsageError
from fimo.workers.functional import Tensors
from fimo.workers.further_training import further_train
from fimo.workers.start import Start


def mean_displacement(start: Start, seeds: Iterable[int], steps: Sequence[int]) -> dict[int, Tensors]:
    """The baseline's θ_t − θᶠ averaged over seeds, by step, in float64 on the CPU.

    Args:
        steps: optimizer steps t, each within the sweep's further training.

    Raises:
        UsageError: a step beyond the sweep's last one.
        DivergedError: a baseline is not finite.
    """
    final = {n: p.detach().to("cpu", torch.float64) for n, p in start.model.params.items()}
    totals = {step: {n: torch.zeros_like(p) for n, p in final.items()} for step in steps}
    seen = 0

    def watch(step: int, params: Tensors) -> None:
        if step in totals:
            for name, origin in final.items():
                totals[step][name] += params[name][0].detach().to("cpu", torch.float64) - origin

    last = max(steps)
    for seed in seeds:
        recorded = further_train(start, [BASELINE], seed, watch=watch, last=last)
        if recorded.steps[-1] < last:
            raise UsageError(f"step {last} lies beyond the {recorded.steps[-1]} steps of further training")
        seen += 1
    means = {step: {n: t / max(seen, 1) for n, t in total.items()} for step, total in totals.items()}
    if not all(bool(t.isfinite().all()) for mean in means.values() for t in mean.values()):
        raise DivergedError("the baseline's displacement is not finite; lower the learning rate or clip")
    return means
