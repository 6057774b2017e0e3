"""Workloads that come with fimo, by the bare name that a spec may give."""

from __future__ import annotations

SHIPPED = {"concrete": "fimo.workers.workloads.tabular:concrete"}
"""Name -> ``module:function``."""
