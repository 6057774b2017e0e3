#!/usr/bin/env python3
"""The manifests of deploy/kuberay, changed as little as a cluster of containers on one machine asks for.

    manifests.py base                   namespace, accounts, network policy, and an S3 server with its keys' Secret
    manifests.py job NAME PREFIX        the RayJob NAME, which runs deploy/kind/sweep.yaml into s3://fimo/PREFIX

The image is that of $IMAGE, and the S3 server's $STORE_IMAGE. Changed: no GPUs, node labels and taints (kind has none),
smaller pods, a second worker at once, the store's address and keys, and the API server's port in the network policy.
Everything else is what users apply.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import yaml

KUBERAY = Path(__file__).parent.parent / "kuberay"
BUCKET, PORT = "fimo", 8333
PART = {"app.kubernetes.io/part-of": "fimo"}
RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
SERVER = ["-ip.bind=0.0.0.0", "-dir=/data", f"-s3.port={PORT}", f"-bucket={BUCKET}", "-admin.ui=false", "-webdav=false"]
SERVER += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]


def main() -> None:
    """YAML on stdout."""
    if sys.argv[1:] == ["base"]:
        documents = base()
    elif len(sys.argv) == 4 and sys.argv[1] == "job":
        documents = [job(sys.argv[2], sys.argv[3])]
    else:
        sys.exit(str(__doc__))
    print(yaml.safe_dump_all(documents, sort_keys=False))


def filled(name: str, **values: str) -> list[Any]:
    """A file of deploy/kuberay, every ${NAME} replaced: by nothing, if no value is given."""
    text = (KUBERAY / name).read_text()
    return list(yaml.safe_load_all(re.sub(r"\$\{(\w+)\}", lambda found: values.get(found[1], ""), text)))


def base() -> list[Any]:
    """What all pods stand on."""
    documents = filled("base.yaml")
    for document in documents:
        document["metadata"].pop("annotations", None)
        if document["kind"] == "NetworkPolicy":
            https = {"protocol": "TCP", "port": 443}
            rules = [rule for rule in document["spec"]["egress"] if https in rule.get("ports", [])]
            rules[0]["ports"].append({"protocol": "TCP", "port": 6443})
    return [*documents, *store()]


def keys() -> list[dict[str, Any]]:
    """The store's keys, from a Secret that the test makes of random ones."""
    names = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    return [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": "fimo-store", "key": key}}} for name, key in names.items()
    ]


def place(host: str) -> list[dict[str, Any]]:
    """Where the store is, and its keys."""
    address = {"AWS_ENDPOINT_URL_S3": f"http://{host}:{PORT}", "AWS_REGION": "us-east-1"}
    return [*({"name": name, "value": value} for name, value in address.items()), *keys()]


def store() -> list[Any]:
    """SeaweedFS in one pod, its data in the pod; fimo is in the image too, for `fimo pull`."""
    container = {
        "name": "store",
        "image": os.environ["STORE_IMAGE"],
        "command": ["weed", "mini", *SERVER],
        "env": place("127.0.0.1"),
        "ports": [{"containerPort": PORT}],
        "readinessProbe": {"tcpSocket": {"port": PORT}},
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
        "securityContext": RESTRICTED,
        "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}},
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "store", "namespace": "fimo", "labels": {**PART, "app": "store"}},
        "spec": {
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 1000,
                "runAsGroup": 100,
                "fsGroup": 100,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": [{"name": "data", "emptyDir": {}}],
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "store", "namespace": "fimo"},
        "spec": {"selector": {"app": "store"}, "ports": [{"port": PORT}]},
    }
    return [pod, service]


def job(name: str, prefix: str) -> Any:
    """One sweep; two workers from the beginning, so that one of them can go."""
    (document,) = filled("rayjob.yaml", IMAGE=os.environ["IMAGE"], REGION="us-east-1", STORE=f"s3://{BUCKET}/{prefix}")
    document["metadata"]["name"] = name
    cluster = document["spec"]["rayClusterSpec"]
    spot = cluster["workerGroupSpecs"][0]
    spot |= {"replicas": 2, "minReplicas": 2, "maxReplicas": 2}
    del spot["labels"]
    cluster["workerGroupSpecs"] = [spot]
    cluster["autoscalerOptions"]["resources"]["requests"] = {"cpu": "100m", "memory": "256Mi"}
    for template, cpus in ((cluster["headGroupSpec"]["template"], "500m"), (spot["template"], "1")):
        template["spec"].pop("nodeSelector")
        template["spec"].pop("tolerations", None)
        container = template["spec"]["containers"][0]
        kept = [entry for entry in container["env"] if entry["name"] != "AWS_REGION"]
        container["env"] = [*kept, *place("store.fimo.svc.cluster.local")]
        container["resources"] = {"requests": {"cpu": cpus, "memory": "2Gi"}, "limits": {"cpu": "1", "memory": "4Gi"}}
    return document


if __name__ == "__main__":
    main()
