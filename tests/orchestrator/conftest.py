"""Fixtures of the small sweep for every room of the orchestrator."""

from tests.support.shell import shell
from tests.support.small_sweep import beside, proven, traced

__all__ = ["beside", "proven", "shell", "traced"]
