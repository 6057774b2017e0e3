"""Fixtures that tests of faults share with others."""

from tests.support.shell import shell

__all__ = ["shell"]
