"""Torch imported as fast as it can be by a process that does one thing; this module itself imports nothing of size."""

from __future__ import annotations

import gc
import importlib

from fimo.workers.garbage import uncollected


def import_to_stay(module: str) -> None:
    """Import a module without a look for garbage, neither then nor when the process ends: what is imported stays.

    Such looks take a tenth of an import of torch, and more at the end. All that is alive now is left out of later ones,
    so call this before there is anything large. What is garbage by now goes first.
    """
    gc.collect()
    with uncollected():
        try:
            importlib.import_module(module)
        finally:
            gc.freeze()
