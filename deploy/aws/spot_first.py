"""Which worker Ray's autoscaler on EC2 asks for: spot while AWS has any, on demand while it has not.

The autoscaler ranks the node types that fit a waiting task by this score, highest first. Its own score does not look at
what AWS has refused, and so asks for spot again and again. A refusal counts for half an hour
(`AUTOSCALER_NODE_AVAILABILITY_MAX_STALENESS_S`); then spot is tried again. Nodes that run are left alone.

Named by RAY_AUTOSCALER_UTILIZATION_SCORER in cluster.yaml. Not here: KubeRay, whose autoscaler has priorities itself.
"""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer

ON_DEMAND = "on-demand"
"""In the names of node types that are paid in full."""


def score(node_resources: Any, resources: Any, node_type: str, *, node_availability_summary: Any) -> Any:
    """Ray's own score, then whether AWS gave such nodes when last asked, then the price; None if nothing fits."""
    fits = _default_utilization_scorer(
        node_resources, resources, node_type, node_availability_summary=node_availability_summary
    )
    if fits is None:
        return None
    record = node_availability_summary.node_availabilities.get(node_type)
    return (*fits, record is None or record.is_available, ON_DEMAND not in node_type)
