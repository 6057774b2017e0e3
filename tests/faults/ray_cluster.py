"""A Ray cluster of several raylets in a process of its own, told by lines on stdin: ``add``, ``kill``.

Prints one line after each: the address, or the number of worker nodes. It ends with its stdin.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster


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
            print(len(nodes), flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
