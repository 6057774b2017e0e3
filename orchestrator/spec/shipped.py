"""Workloads that come with fimo, by the bare name that a spec may give."""

from __future__ import annotations

SHIPPED = {
    "concrete": "fimo.workers.workloads.tabular:concrete",
    "energy": "fimo.workers.workloads.energy:energy",
    "heloc": "fimo.workers.workloads.heloc:heloc",
    "folktables": "fimo.workers.workloads.income:income",
    "sst2": "fimo.workers.workloads.sst2:sst2",
    "causal_lm": "fimo.workers.workloads.causal_lm:causal_lm",
    "cifar10": "fimo.workers.workloads.cifar10:cifar10",
}
"""Name -> ``module:function``."""
