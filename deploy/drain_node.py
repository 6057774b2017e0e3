#!/usr/bin/env python3
"""Take this Ray node out of service and wait: what a pod does before it ends (KubeRay's preStop hook).

Ray places nothing new on a draining node, lets its tasks finish, and does not count their loss as a failure
when the node goes while they run (ray#54182). A shard that does not finish in time is computed again
elsewhere; nothing committed is lost.

    drain_node.py SECONDS [NODE_ID]     NODE_ID: this machine's node unless given
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time


def main() -> int:
    """Ask for the drain, then wait until the node has gone or SECONDS have passed."""
    import ray

    seconds = int(sys.argv[1])
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    context = ray.get_runtime_context()
    node = sys.argv[2] if len(sys.argv) > 2 else context.get_node_id()
    command = ["ray", "drain-node", "--address", context.gcs_address, "--node-id", node]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the pod is ending"]
    command += ["--deadline-remaining-seconds", str(seconds)]
    subprocess.run(command, check=True)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(entry["Alive"] and entry["NodeID"] == node for entry in ray.nodes()):
            return 0
        time.sleep(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
