"""The Kubernetes manifests, offline: no unknown field anywhere, and the promises of deploy/README.md."""

from __future__ import annotations

import copy
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray._private import ray_constants
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.schema import AutoscalerInstance
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import NodeState, NodeStatus, ResourceRequestByCount
from ray.core.generated.common_pb2 import LabelSelectorOperator
from ray.core.generated.instance_manager_pb2 import Instance

from tests.deploy.manifests import DEPLOY, ROOT, yaml_documents

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
    markets = {}
    for group in cluster["workerGroupSpecs"]:
        assert (group["replicas"], group["minReplicas"]) == (0, 0)
        worker = group["template"]["spec"]
        markets[group["groupName"]] = worker["nodeSelector"]["eks.amazonaws.com/capacityType"]
        (container,) = worker["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert markets == {"gpu-spot": "SPOT", "gpu-on-demand": "ON_DEMAND"}


@pytest.mark.parametrize("path", RAY_FILES)
def test_ray_drains_a_pod_that_ends_within_its_grace_and_awss_notice(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable is read by the installed Ray, so that a misspelt one is seen."""
    for group in cluster_spec(path)["workerGroupSpecs"]:
        worker = group["template"]["spec"]
        (container,) = worker["containers"]
        assert "lifecycle" not in container
        for entry in container["env"]:
            if "value" in entry:
                monkeypatch.setenv(entry["name"], entry["value"])
        try:
            seconds = importlib.reload(ray_constants).RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
            monkeypatch.undo()
        finally:
            importlib.reload(ray_constants)
        assert seconds == 100
        assert seconds < worker["terminationGracePeriodSeconds"] <= 120


def launches(demand: dict[str, float], label: str | None = None, refused: str | None = None) -> dict[str, int]:
    """What Ray's autoscaler would start for three tasks, by its own reading of raycluster.yaml; {} if it cannot."""
    config = AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(ray_object("kuberay/raycluster.yaml")))
    constraints = [] if label is None else [(LabelSelectorOperator.LABEL_OPERATOR_IN, label)]
    request = ResourceRequestUtil.make(demand)
    for operator, value in constraints:
        selector = request.label_selectors.add()
        selector.label_constraints.add(label_key="ray.io/accelerator-type", operator=operator, label_values=[value])
    head = AutoscalerInstance(
        cloud_instance_id="head",
        im_instance=Instance(instance_id="head", instance_type="headgroup", status=Instance.RAY_RUNNING),
        ray_node=NodeState(
            node_id=b"head", ray_node_type_name="headgroup", instance_id="head", status=NodeStatus.RUNNING
        ),
    )
    asked = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=[ResourceRequestByCount(request=request, count=3)],
        current_instances=[head],
        recoverable_resource_availabilities={refused: 0.0} if refused else {},
    )
    reply = ResourceDemandScheduler(None).schedule(asked)
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def test_the_autoscaler_asks_for_spot_first_and_for_on_demand_once_there_is_none() -> None:
    assert launches({"CPU": 1, "GPU": 1}) == {"gpu-spot": 3}
    assert launches({"CPU": 1, "GPU": 1}, refused="gpu-spot") == {"gpu-on-demand": 2, "gpu-spot": 1}
    groups = cluster_spec("kuberay/raycluster.yaml")["workerGroupSpecs"]
    spot, full = groups
    assert spot["priority"] > full["priority"]
    patience = cluster_spec("kuberay/raycluster.yaml")["autoscalerOptions"]["env"]
    assert patience == [{"name": "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S", "value": "900"}]


def test_the_autoscaler_knows_the_gpus_of_workers_that_are_not_there_yet() -> None:
    assert launches({"CPU": 1, "GPU": 1}, label="A10G") == {"gpu-spot": 3}
    assert launches({"CPU": 1, "GPU": 1}, label="H100") == {}


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
    outside = [rule for rule in policy["spec"]["egress"] if "ipBlock" in rule["to"][0]]
    assert all("ports" in rule for rule in outside)
    blocks = {target["ipBlock"]["cidr"]: target["ipBlock"].get("except") for rule in outside for target in rule["to"]}
    # The node's metadata service, in either family.
    assert blocks["0.0.0.0/0"] == ["169.254.169.254/32"]
    assert blocks["::/0"] == ["fd00:ec2::254/128"]


def test_the_network_policy_lets_pods_ask_for_names_wherever_nodes_answer() -> None:
    (policy,) = (d for d in core_objects() if d["kind"] == "NetworkPolicy")
    answering = [
        target
        for rule in policy["spec"]["egress"]
        if {"protocol": "UDP", "port": 53} in rule.get("ports", [])
        for target in rule["to"]
    ]
    assert {"ipBlock": {"cidr": "169.254.20.10/32"}} in answering
    assert any("podSelector" in target for target in answering)
    reached = [
        target["ipBlock"]["cidr"] for rule in policy["spec"]["egress"] for target in rule["to"] if "ipBlock" in target
    ]
    assert "::/0" in reached


def test_nothing_keeps_a_node_from_being_drained() -> None:
    """A budget of one head, minAvailable 1, blocks `kubectl drain` for ever."""
    assert not [d for d in core_objects() if d["kind"] == "PodDisruptionBudget"]
    for path in RAY_FILES:
        kept = cluster_spec(path)["headGroupSpec"]["template"]["metadata"]["annotations"]
        assert kept["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
        assert kept["karpenter.sh/do-not-disrupt"] == "true"


def test_a_failed_head_is_kept_an_hour_and_no_end_leaves_a_cluster_behind() -> None:
    spec = ray_object("kuberay/rayjob.yaml")["spec"]
    rules = spec["deletionStrategy"]["deletionRules"]
    kept = {next(iter(rule["condition"].items())): rule["condition"]["ttlSeconds"] for rule in rules}
    assert kept == {("jobStatus", "SUCCEEDED"): 60, ("jobDeploymentStatus", "Failed"): 3600}
    # The operator refuses a job that has both, and workers deleted by rule beside an autoscaler.
    assert "shutdownAfterJobFinishes" not in spec
    assert "ttlSecondsAfterFinished" not in spec
    assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    assert {rule["policy"] for rule in rules} == {"DeleteCluster"}


def test_the_deadline_is_longer_than_the_longest_sweep_that_the_walk_reckons() -> None:
    hours = [float(number) for number in re.findall(r"\| ([\d.]+) × 0\.101", (DEPLOY / "README.md").read_text())]
    assert max(hours) == 125
    assert ray_object("kuberay/rayjob.yaml")["spec"]["activeDeadlineSeconds"] > 2 * 3600 * max(hours)


def test_the_job_continues_a_sweep_and_is_tried_again() -> None:
    spec = ray_object("kuberay/rayjob.yaml")["spec"]
    assert spec["backoffLimit"] >= 1
    assert spec["entrypoint"] == "fimo run sweep.yaml --store s3://my-bucket/runs --address auto"
    mounted = spec["submitterPodTemplate"]["spec"]["containers"][0]["volumeMounts"][0]["mountPath"]
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"working_dir": mounted}
