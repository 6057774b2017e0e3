"""Which nodes a task may run on by their GPUs, and what is said of GPUs that nobody asked for. No Ray in here.

A node's type of GPU is its label ``ray.io/accelerator-type``: Ray reads it from the driver, and autoscalers are told it
for nodes that are not there yet. The label is a condition without a fallback, since another type rounds otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from fimo.orchestrator.spec.spec import Resources

LABEL = "ray.io/accelerator-type"
NODE_LABEL = "ray.io/node-id"


class Placed(Protocol):
    """Of a node: what Ray counts there, and its type of GPU or ""."""

    @property
    def resources(self) -> Mapping[str, float]:
        """What Ray counts."""

    @property
    def accelerator(self) -> str:
        """The label."""


def selector(resources: Resources, avoided: Iterable[str] = ()) -> dict[str, str]:
    """The labels that a task asks of its node: the spec's type of GPU, and to be none of these nodes, by Ray's ids."""
    labels = {} if resources.accelerator is None else {LABEL: resources.accelerator}
    if away := sorted(avoided):
        labels[NODE_LABEL] = f"!in({','.join(away)})"
    return labels


def fits(node: Placed, resources: Resources) -> bool:
    """Whether a node has the type of GPU that the spec names, if it names one."""
    return resources.accelerator is None or node.accelerator == resources.accelerator


def in_words(resources: Resources) -> str:
    """What a task asks for."""
    kind = "" if resources.accelerator is None else f" ({resources.accelerator})"
    return f"{resources.cpus:g} CPUs and {resources.gpus:g} GPUs{kind}"


def types(nodes: Iterable[Placed]) -> str:
    """The types of GPU that there are, for people."""
    return ", ".join(sorted({node.accelerator for node in nodes} - {""}))


def idle_gpus(nodes: Iterable[Placed], resources: Resources, where: str = "the cluster") -> str | None:
    """One line if there are GPUs and the spec asks for none; its tasks then train on CPUs, at the price of GPUs."""
    having: Sequence[Placed] = [node for node in nodes if node.resources.get("GPU", 0)]
    if resources.gpus or not having:
        return None
    return idle_line(sum(node.resources["GPU"] for node in having), where, types(having))


def idle_line(count: float, where: str, kinds: str = "") -> str:
    """What is said of GPUs that stay idle."""
    named = f" ({kinds})" if kinds else ""
    return (
        f"{where} has {count:g} GPU{'s' if count != 1 else ''}{named} and the spec asks for none: "
        "it trains on CPUs; `resources: {gpus: 1}` in the spec gives every task one"
    )
