"""A worker whose imports fail, or its GPU: it says why, fails one task, and ends before it takes others down."""

from __future__ import annotations

import subprocess
import sys
import time

BROKEN = """
import gc, pickle, sys, types
sys.modules["ray"] = types.SimpleNamespace(get=lambda reference: reference)
class Broken:
    def __reduce__(self):
        return __import__, ("no_such_module",)
from fimo.orchestrator.run import entry
assert "torch" not in sys.modules
entry.LAST_WORDS_S = 0.2
try:
    entry.enter([pickle.dumps(Broken())], [], b"")
except ImportError as error:
    print("said:", error, flush=True)
assert gc.isenabled()
entry.enter([pickle.dumps(Broken())], [], b"")
print("took another task", flush=True)
"""


def test_a_worker_that_cannot_import_says_why_once_and_ends() -> None:
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "said: No module named 'no_such_module'" in ended.stdout
    assert "took another task" not in ended.stdout
    assert time.monotonic() - began < 30


FAILING = """
import pickle, sys, types
def synchronize():
    if lost:
        raise RuntimeError("CUDA error: device-side assert triggered")
sys.modules["ray"] = types.SimpleNamespace(get=lambda reference: reference)
cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
from fimo.orchestrator.run import entry
entry.LAST_WORDS_S = 0.2
def fails(*_):
    raise ValueError("a task's own error")
task = [pickle.dumps((fails, None, None))], [], pickle.dumps(None)
for lost in (False, True, True):
    try:
        entry.enter(*task)
    except ValueError as error:
        print("said:", error, flush=True)
"""


def test_a_worker_whose_gpu_is_lost_fails_one_task_and_ends() -> None:
    """After an illegal access CUDA refuses all that a process asks: it would fail every task that it is given."""
    ended = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1, ended.stderr
    assert ended.stdout == "said: a task's own error\n" * 2
