"""Where a task enters a worker process.

Python cannot import torch twice: after an import that failed halfway, every later one fails too, each time in another
way. A worker in that state would take task after task and fail them all. So this module imports nothing but the
standard library and Ray, which runs it; what it is given is bytes, and a worker whose imports fail says why, once, and
ends. So does one that CUDA has given up: after an illegal access, or a label out of bounds, all that it is asked fails.
"""

from __future__ import annotations

import gc
import os
import pickle
import sys
import threading
import time
from typing import Any

LAST_WORDS_S = 1.0
"""Seconds that a broken worker has for its error to travel."""

_broken = threading.Event()


def enter(shared: list[Any], final_model: list[Any], task: bytes) -> Any:
    """Run a task in this process and return its receipt.

    Args:
        shared: a reference to the pickled function that runs tasks, sweep and manifest, in a list; ``task``: pickled.

    Raises:
        Exception: the task's own error, or that of the imports that it needs.
    """
    import ray

    if _broken.is_set():
        # The driver counts a worker's death, but no failure, against what waits here.
        time.sleep(60 * LAST_WORDS_S)
    pickled = ray.get(shared[0])
    try:
        # What is imported for the first task is no garbage: to look for some takes a tenth of torch's import.
        gc.disable()
        work, sweep, manifest = pickle.loads(pickled)
        wanted = pickle.loads(task)
    except Exception:
        _end()
        raise
    finally:
        gc.enable()
    try:
        return work(sweep, manifest, final_model, wanted)
    except Exception:
        if _device_is_lost():
            _end()
        raise


def _end() -> None:
    _broken.set()
    threading.Timer(LAST_WORDS_S, os._exit, [1]).start()


def _device_is_lost() -> bool:
    """Whether CUDA does nothing more in this process."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return False
    try:
        cuda.synchronize()
    except Exception:
        return True
    return False
