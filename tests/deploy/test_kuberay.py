"""The Kubernetes manifests, offline: no unknown field anywhere, and the promises of deploy/README.md."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from tests.deploy.manifests import ROOT, yaml_documents

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs the dev extra")

KUBERNETES = "1.34"
RAY_FILES = ["kuberay/rayjob.yaml", "kuberay/raycluster.yaml"]
OWN_SCHEMA = json.loads((Path(__file__).parent / "kuberay.schema.json").read_text())
CRD_SCHEMAS = ROOT.parent / "shared" / "schemas"


def ray_object(path: str) -> dict[str, Any]:
    (document,) = yaml_documents(path)
    return document


def cluster_spec(path: str) -> dict[str, Any]:
    spec: dict[str, Any] = ray_object(path)["spec"]
    return spec.get("rayClusterSpec", spec)


def templates(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    spec, cluster = ray_object(path)["spec"], cluster_spec(path)
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield "worker", group["template"]
    if "submitterPodTemplate" in spec:
        yield "submitter", spec["submitterPodTemplate"]


def core_objects() -> list[dict[str, Any]]:
    return yaml_documents("kuberay/base.yaml")


@pytest.mark.parametrize("document", core_objects(), ids=lambda d: f"{d['kind']}-{d['metadata']['name']}")
def test_core_objects_are_valid_and_have_no_unknown_field(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)
    broken = {**document, "speck": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", RAY_FILES)
def test_ray_objects_have_no_unknown_field(path: str) -> None:
    document = ray_object(path)
    jsonschema.validate(document, OWN_SCHEMA)
    for where in (document, document["spec"], cluster_spec(path)["headGroupSpec"]):
        broken = copy.deepcopy(document)
        _at_same_place(document, broken, where)["replcias"] = 1
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, OWN_SCHEMA)


def _at_same_place(whole: Any, copied: Any, part: Any) -> Any:
    """The place in `copied` that `part` has in `whole`."""
    if whole is part or whole == part:
        return copied
    if isinstance(whole, dict):
        for key, value in whole.items():
            inner = _at_same_place(value, copied[key], part)
            if inner is not None:
                return inner
    return None


@pytest.mark.parametrize("path", RAY_FILES)
def test_ray_objects_keep_the_operators_own_schema(path: str) -> None:
    document = ray_object(path)
    name = f"kuberay-1.7.0-{document['kind'].lower()}-v1.schema.json"
    if not (CRD_SCHEMAS / name).exists():
        pytest.skip("the operator's schemas are not beside this checkout")
    jsonschema.Draft202012Validator(json.loads((CRD_SCHEMAS / name).read_text())).validate(document)


@pytest.mark.parametrize("path", RAY_FILES)
def test_pod_templates_are_valid_pods(path: str) -> None:
    for name, template in templates(path):
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, **template["metadata"]},
            "spec": template["spec"],
        }
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_job_and_cluster_have_the_same_cluster() -> None:
    assert cluster_spec("kuberay/rayjob.yaml") == cluster_spec("kuberay/raycluster.yaml")


@pytest.mark.parametrize("path", RAY_FILES)
def test_no_container_starts_without_token_authentication(path: str) -> None:
    cluster = cluster_spec(path)
    assert cluster["authOptions"] == {"mode": "token", "secretName": "fimo-ray-token"}
    for _, template in templates(path):
        for container in template["spec"]["containers"]:
            environment = {entry["name"]: entry for entry in container["env"]}
            assert environment["RAY_AUTH_MODE"]["value"] == "token"
            token = environment["RAY_AUTH_TOKEN"]
            assert token["valueFrom"] == {"secretKeyRef": {"name": "fimo-ray-token", "key": "auth_token"}}
            assert "value" not in token


@pytest.mark.parametrize("path", RAY_FILES)
def test_the_version_is_the_installed_ray(path: str) -> None:
    assert cluster_spec(path)["rayVersion"] == ray.__version__


@pytest.mark.parametrize("path", RAY_FILES)
def test_the_head_is_on_demand_and_runs_no_shard_and_workers_come_from_none(path: str) -> None:
    cluster = cluster_spec(path)
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    head = cluster["headGroupSpec"]["template"]["spec"]
    assert head["nodeSelector"] == {"eks.amazonaws.com/capacityType": "ON_DEMAND"}
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"]) == (0, 0)
    worker = group["template"]["spec"]
    assert worker["nodeSelector"] == {"eks.amazonaws.com/capacityType": "SPOT"}
    (container,) = worker["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    *_, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    # The drain must end before Kubernetes kills the pod, and that within AWS's two minutes of notice.
    assert int(seconds) < worker["terminationGracePeriodSeconds"] <= 120


@pytest.mark.parametrize("path", RAY_FILES)
def test_pods_keep_the_restricted_standard_and_the_network_policy(path: str) -> None:
    for name, template in templates(path):
        assert template["metadata"]["labels"] == {"app.kubernetes.io/part-of": "fimo"}
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        assert template["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        expected = "fimo-driver" if name == "head" else "fimo-worker"
        assert template["spec"]["serviceAccountName"] == expected
        if name != "head":
            assert template["spec"]["automountServiceAccountToken"] is False


def test_the_network_policy_lets_in_fimo_and_the_operator_alone() -> None:
    (policy,) = (d for d in core_objects() if d["kind"] == "NetworkPolicy")
    sources = [source for rule in policy["spec"]["ingress"] for source in rule["from"]]
    assert sources == [
        {"podSelector": {"matchLabels": {"app.kubernetes.io/part-of": "fimo"}}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-operator"}}},
    ]
    assert sorted(policy["spec"]["policyTypes"]) == ["Egress", "Ingress"]
    open_to_all = [rule for rule in policy["spec"]["egress"] if "ipBlock" in rule["to"][0]]
    assert all("ports" in rule for rule in open_to_all)
    assert "169.254.169.254/32" in open_to_all[0]["to"][0]["ipBlock"]["except"]


def test_the_disruption_budget_holds_the_head_of_either_kind() -> None:
    (budget,) = (d for d in core_objects() if d["kind"] == "PodDisruptionBudget")
    assert budget["spec"]["minAvailable"] == 1
    assert budget["spec"]["selector"]["matchLabels"]["ray.io/node-type"] == "head"


def test_the_job_continues_a_sweep_and_is_tried_again() -> None:
    spec = ray_object("kuberay/rayjob.yaml")["spec"]
    assert spec["backoffLimit"] >= 1
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["entrypoint"] == "fimo run sweep.yaml --store s3://my-bucket/runs --address auto"
    mounted = spec["submitterPodTemplate"]["spec"]["containers"][0]["volumeMounts"][0]["mountPath"]
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"working_dir": mounted}
