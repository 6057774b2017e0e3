"""Whole passes on a device that is not the CPU: nothing is left behind there, and the host waits for nothing."""

from __future__ import annotations

import json
import subprocess
import sys


def test_a_pass_leaves_nothing_on_the_cpu_and_waits_for_nothing() -> None:
    command = [sys.executable, "-m", "tests.workers.stacking.pretended"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    wrong = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(wrong) == 19
    # The device itself is seen to refuse: a model that leaves a tensor behind, and one that reads a number.
    assert "takes a tensor from the CPU" in wrong.pop("left behind")
    assert "DataDependent" in wrong.pop("reads")
    assert wrong == dict.fromkeys(wrong)
