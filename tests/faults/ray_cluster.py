"""A Ray cluster of several raylets in a process of its own, told by lines on stdin.

``add`` and ``kill`` a worker node, ``freeze`` one with its workers, ``thaw`` it, ``behead``: kill the head's server.

Prints one line after each: the address, or the number of worker nodes. It ends with its stdin.
"""

from __future__ import annotations

import os
import signal
import sys

from ray.cluster_utils import Cluster

from tests.faults.processes import descendants


def main() -> None:
    """One head without CPUs and two worker nodes of one CPU each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    try:
        print(cluster.address, flush=True)
        for line in sys.stdin:
            if line.strip() == "add":
                nodes.append(cluster.add_node(num_cpus=1))
            elif line.strip() == "kill":
                cluster.remove_node(nodes.pop(0), allow_graceful=False)
            elif line.strip() in ("freeze", "thaw"):
                sent = signal.SIGSTOP if line.strip() == "freeze" else signal.SIGCONT
                raylet = nodes[0].all_processes["raylet"][0].process.pid
                for pid in [raylet, *(pid for pid, _ in descendants(raylet))]:
                    os.kill(pid, sent)
            elif line.strip() == "behead":
                for pid, command in descendants(os.getpid()):
                    if "gcs_server" in command.split(" ")[0]:
                        os.kill(pid, signal.SIGKILL)
            print(len(nodes), flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
