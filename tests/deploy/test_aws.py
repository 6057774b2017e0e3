"""The AWS files, offline: Ray's own schema for the cluster, and what each policy lets whom do."""

from __future__ import annotations

import fnmatch
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import botocore.validate
import pytest
import yaml
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.loader import load_function_or_class
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilityRecord, NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config

from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.store.base import PROBE_PREFIX
from fimo.orchestrator.sweep import keys
from tests.deploy.manifests import DEPLOY, VALUES, filled, json_document

IDENTITY_POLICIES = ["aws/iam-policy.json", "aws/iam-policy-driver.json", "aws/iam-policy-autoscaler.json"]
IDENTITY_POLICIES += ["aws/iam-policy-kms.json"]
POLICIES = [*IDENTITY_POLICIES, "aws/bucket-policy.json", "aws/trust-ec2.json"]

REMOVALS = (NamedRemoval(0, "0", (1,)), NamedRemoval(1, "1", (2,)))
PART = "runs/" + keys.part("concrete", "d" * 64, 3, REMOVALS)
ESTIMATE = "runs/" + keys.block(keys.estimates("concrete", "d" * 64, "cg", "{}"), REMOVALS, 0, 10)
REPLICAS = "runs/" + keys.replicas("concrete", "d" * 64, "cpu")
PROOF = "runs/" + keys.proof("concrete", "d" * 64, "cpu", "0" * 16)
WITNESS = "runs/" + keys.witness("concrete", "d" * 64, 3)
SPEC = "runs/concrete/sweep.json"
TABLE = "runs/concrete/tables/scores.parquet"
REJECTED = "runs/concrete/rejected/parts_dddd_seed-0000000003_0123.parquet"  # flat: "*/parts/*" must not match it
FAILED = "runs/concrete/failed/x.json"
HEARTBEAT = "runs/" + keys.driver("concrete", "host-1-0123")
PROBE = f"runs/{PROBE_PREFIX}0123"
IMPORTED = "runs/" + keys.imported("concrete", "theirs")
CLAIM = "runs/" + keys.claim("concrete", "d-seed-0000000003-0123", 1)
FOREIGN = "other/concrete/parts/x.parquet"


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def allows(policies: list[str], action: str, key: str | None, *, conditional: bool = True) -> bool:
    """IAM's rule for the conditions used here: an explicit Deny wins, else an Allow must match."""
    resource = "arn:aws:s3:::my-bucket" + (f"/{key}" if key is not None else "")
    effects = {
        statement["Effect"]
        for path in policies
        for statement in json_document(path)["Statement"]
        if any(fnmatch.fnmatchcase(action, pattern) for pattern in listed(statement["Action"]))
        and any(fnmatch.fnmatchcase(resource, pattern) for pattern in listed(statement["Resource"]))
        and _holds(statement.get("Condition", {}), conditional)
    }
    return "Deny" not in effects and "Allow" in effects


def _holds(condition: dict[str, Any], conditional: bool) -> bool:
    """Over TLS, an object written in one piece."""
    known = {
        ("Null", "s3:if-none-match"): "false" if conditional else "true",
        ("Bool", "s3:ObjectCreationOperation"): "true",
        ("Bool", "aws:SecureTransport"): "true",
        ("StringLikeIfExists", "s3:prefix"): None,
    }
    return all(
        known[operator, key] is None or known[operator, key] == value
        for operator, tests in condition.items()
        for key, value in tests.items()
    )


WORKER, DRIVER = ["aws/iam-policy.json"], ["aws/iam-policy-driver.json"]


def test_ray_accepts_the_cluster_file() -> None:
    config = prepare_config(yaml.safe_load(filled("aws/cluster.yaml")))
    validate_config(config)
    with pytest.raises(Exception, match="replcias"):
        validate_config({**config, "replcias": 1})


def test_the_cluster_is_closed_and_on_demand_at_the_head() -> None:
    config = yaml.safe_load(filled("aws/cluster.yaml"))
    types = config["available_node_types"]
    head = types["head"]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    for worker in (types["gpu-spot"], types["gpu-on-demand"]):
        assert worker["min_workers"] == 0
        # Without a profile Ray makes a role with full access to EC2 and S3.
        assert head["node_config"]["IamInstanceProfile"] != worker["node_config"]["IamInstanceProfile"]
    assert types["gpu-spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert all(t["node_config"]["MetadataOptions"]["HttpTokens"] == "required" for t in types.values())
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])


def test_spot_and_on_demand_are_the_same_nodes_but_for_the_price() -> None:
    types = yaml.safe_load(filled("aws/cluster.yaml"))["available_node_types"]
    spot, full = types["gpu-spot"], types["gpu-on-demand"]
    market = spot["node_config"].pop("InstanceMarketOptions")
    assert market == {"MarketType": "spot"}
    assert spot == full


class Aws:
    """EC2 and IAM as ``ray up`` meets them: one VPC with a subnet, no keys, the README's security group or none."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.groups = [
            {"GroupId": VALUES["SECURITY_GROUP"], "VpcId": "vpc-1", "GroupName": "fimo", "IpPermissions": []}
        ]

    def answer(self, operation: str, request: dict[str, Any]) -> dict[str, Any]:
        self.calls.append((operation, request))
        subnet = {"SubnetId": "subnet-1", "VpcId": "vpc-1", "State": "available", "MapPublicIpOnLaunch": True}
        match operation:
            case "DescribeKeyPairs":
                return {"KeyPairs": []}
            case "CreateKeyPair":
                return {"KeyName": request["KeyName"], "KeyMaterial": "a key"}
            case "DescribeSubnets":
                return {"Subnets": [subnet | {"AvailabilityZone": "us-east-1a"}]}
            case "DescribeSecurityGroups":
                wanted = [v for f in request.get("Filters", []) if f["Name"] == "group-id" for v in f["Values"]]
                found = [g for g in self.groups if g["GroupId"] in wanted]
                return {"SecurityGroups": found if wanted else self.groups[1:]}
            case "CreateSecurityGroup":
                self.groups.append(
                    {"GroupId": "sg-ray", "VpcId": "vpc-1", "GroupName": request["GroupName"], "IpPermissions": []}
                )
                return {"GroupId": "sg-ray"}
            case "AuthorizeSecurityGroupIngress":
                return {"Return": True}
        raise AssertionError(f"ray up asks AWS for {operation}")


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Aws:
    stub = Aws()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setattr("botocore.client.BaseClient._make_api_call", stub.answer)
    return stub


def test_what_ray_resolves_has_no_door_that_ray_opened(aws: Aws) -> None:
    resolved = bootstrap_aws(prepare_config(yaml.safe_load(filled("aws/cluster.yaml"))))
    for node_type in resolved["available_node_types"].values():
        assert node_type["node_config"]["SecurityGroupIds"] == [VALUES["SECURITY_GROUP"]]
        assert node_type["node_config"]["SubnetIds"] == ["subnet-1"]
    asked = {operation for operation, _ in aws.calls}
    assert asked == {"DescribeKeyPairs", "CreateKeyPair", "DescribeSubnets", "DescribeSecurityGroups"}


def test_without_the_group_ray_opens_ssh_to_the_world(aws: Aws) -> None:
    """What the group is for, and that the stub would show it: rules of one's own do not replace Ray's."""
    config = yaml.safe_load(filled("aws/cluster.yaml"))
    for node_type in config["available_node_types"].values():
        del node_type["node_config"]["SecurityGroupIds"]
    config["provider"]["security_group"] = {
        "GroupName": "fimo",
        "IpPermissions": json_document("aws/security-group.json"),
    }
    bootstrap_aws(prepare_config(config))
    opened = [request["IpPermissions"] for operation, request in aws.calls if operation.startswith("Authorize")]
    assert [22, "0.0.0.0/0"] in [
        [rule.get("FromPort"), place["CidrIp"]]
        for rules in opened
        for rule in rules
        for place in rule.get("IpRanges", [])
    ]


def test_the_security_group_lets_in_ssh_from_one_address_and_its_own_nodes() -> None:
    client = boto3.session.Session().client("ec2", region_name="us-east-1")
    shape = client.meta.service_model.operation_model("AuthorizeSecurityGroupIngress").input_shape
    rules: Any = json_document("aws/security-group.json")
    report = botocore.validate.ParamValidator().validate({"GroupId": "sg-1", "IpPermissions": rules}, shape)
    assert not report.has_errors(), report.generate_report()
    ssh, nodes = rules
    assert (ssh["FromPort"], ssh["ToPort"], ssh["IpProtocol"]) == (22, 22, "tcp")
    assert [place["CidrIp"] for place in ssh["IpRanges"]] == [VALUES["ADMIN_CIDR"]]
    assert [pair["GroupId"] for pair in nodes["UserIdGroupPairs"]] == [VALUES["SECURITY_GROUP"]]
    assert "IpRanges" not in nodes


@pytest.mark.parametrize(
    ("refused", "expected"),
    [((), {"gpu-spot": 3}), (("gpu-spot",), {"gpu-on-demand": 3}), (("gpu-spot", "gpu-on-demand"), {"gpu-spot": 3})],
    ids=["spot is there", "spot is refused", "both are refused"],
)
def test_the_autoscaler_asks_for_spot_until_aws_refuses_it(
    monkeypatch: pytest.MonkeyPatch, refused: tuple[str, ...], expected: dict[str, int]
) -> None:
    """Ray's own planning of nodes over the cluster file, with the score that the head is started with."""
    config = prepare_config(yaml.safe_load(filled("aws/cluster.yaml")))
    (start,) = [line for line in config["head_start_ray_commands"] if "--head" in line]
    (named,) = re.findall(r"RAY_AUTOSCALER_UTILIZATION_SCORER=(\S+) ray start", start)
    monkeypatch.syspath_prepend(str(DEPLOY / "aws"))
    seen = NodeAvailabilitySummary({name: NodeAvailabilityRecord(name, False, 0.0, None) for name in refused})
    scorer = partial(load_function_or_class(named), node_availability_summary=seen)
    types = config["available_node_types"]
    added, left = get_nodes_for(types, {"head": 1}, "head", config["max_workers"], [{"CPU": 1, "GPU": 1}] * 3, scorer)
    assert (dict(added), left) == (expected, [])
    added, _ = get_nodes_for(types, {"head": 1}, "head", config["max_workers"], [{"GPU": 1}] * 30, scorer)
    assert sum(added.values()) == config["max_workers"] == 8


@pytest.mark.parametrize("path", POLICIES)
def test_a_policy_has_iams_shape(path: str) -> None:
    policy = json_document(path)
    assert set(policy) == {"Version", "Statement"}
    assert policy["Version"] == "2012-10-17"
    sids = [statement.get("Sid") for statement in policy["Statement"]]
    assert len(set(sids)) == len(sids)
    for statement in policy["Statement"]:
        assert set(statement) <= {"Sid", "Effect", "Principal", "Action", "Resource", "Condition"}
        assert statement["Effect"] in ("Allow", "Deny")
        assert ("Principal" in statement) == (path not in IDENTITY_POLICIES)
        assert all(re.fullmatch(r"[a-z0-9]+:[A-Za-z*]+", action) for action in listed(statement["Action"]))
        if "Sid" in statement:
            assert re.fullmatch(r"[A-Za-z0-9]+", statement["Sid"])
    assert len(json.dumps(policy, separators=(",", ":"))) < 6144  # IAM's limit for a managed policy


@pytest.mark.parametrize("path", IDENTITY_POLICIES)
def test_no_policy_allows_everything_of_a_service(path: str) -> None:
    for statement in json_document(path)["Statement"]:
        if statement["Effect"] == "Allow":
            actions = listed(statement["Action"])
            assert not any("*" in action for action in actions)
            if not all(re.match(r"(ec2:Describe|ecr:)", action) for action in actions):
                assert "*" not in listed(statement["Resource"])


def test_workers_create_results_and_read_and_nothing_else() -> None:
    for key in (PART, WITNESS, ESTIMATE, REPLICAS, PROOF):
        assert allows(WORKER, "s3:PutObject", key)
        assert not allows(WORKER, "s3:PutObject", key, conditional=False)
        assert allows(WORKER, "s3:GetObject", key)
    for key in (SPEC, TABLE, REJECTED, FAILED, HEARTBEAT, PROBE, FOREIGN):
        assert not allows(WORKER, "s3:PutObject", key)
    for key in (PART, WITNESS, ESTIMATE, REPLICAS, PROOF, SPEC, TABLE, REJECTED, FAILED, HEARTBEAT, PROBE, FOREIGN):
        assert not allows(WORKER, "s3:DeleteObject", key)
        assert not allows([*DRIVER, *WORKER], "s3:DeleteObject", key), "an attached driver policy must not help"
    assert not allows([*DRIVER, *WORKER], "s3:DeleteObjectVersion", PART)
    assert allows(WORKER, "s3:GetObject", SPEC)
    assert allows(WORKER, "s3:ListBucket", None)
    assert not allows(WORKER, "s3:GetObject", FOREIGN)


def test_the_driver_writes_everything_sets_results_aside_and_never_replaces_one() -> None:
    for key in (PART, WITNESS, ESTIMATE, SPEC, TABLE, REJECTED, FAILED, REPLICAS, PROOF, HEARTBEAT, PROBE):
        assert allows(DRIVER, "s3:PutObject", key)
        assert allows(DRIVER, "s3:GetObject", key)
    for key in (PART, WITNESS, ESTIMATE):
        assert not allows(DRIVER, "s3:PutObject", key, conditional=False)
    for key in (SPEC, TABLE, REJECTED, FAILED, HEARTBEAT):
        assert allows(DRIVER, "s3:PutObject", key, conditional=False)
    for key in (PART, WITNESS, ESTIMATE, REPLICAS, PROOF, IMPORTED, FAILED, HEARTBEAT, PROBE):
        assert allows(DRIVER, "s3:DeleteObject", key)
    for key in (SPEC, TABLE, REJECTED):
        assert not allows(DRIVER, "s3:DeleteObject", key)
    for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject"):
        assert not allows(DRIVER, action, FOREIGN)


def test_drivers_alone_make_and_withdraw_claims() -> None:
    for policies in (DRIVER, [*DRIVER, "aws/bucket-policy.json"]):
        for conditional in (True, False):
            assert allows(policies, "s3:PutObject", CLAIM, conditional=conditional)
        assert allows(policies, "s3:DeleteObject", CLAIM)
        assert allows(policies, "s3:GetObject", CLAIM)
    assert allows(WORKER, "s3:GetObject", CLAIM)
    assert not allows(WORKER, "s3:PutObject", CLAIM)
    assert not allows(WORKER, "s3:DeleteObject", CLAIM)


def test_the_bucket_policy_refuses_unconditional_writes_of_results_from_anyone() -> None:
    everyone = [*DRIVER, "aws/bucket-policy.json"]
    assert allows(everyone, "s3:PutObject", PART)
    assert not allows(everyone, "s3:PutObject", PART, conditional=False)
    assert allows(everyone, "s3:PutObject", TABLE, conditional=False)
    for statement in json_document("aws/bucket-policy.json")["Statement"]:
        assert statement["Effect"] == "Deny"
        assert statement["Principal"] == "*"


def test_the_autoscaler_ends_its_own_nodes_and_passes_one_role() -> None:
    statements = {s["Sid"]: s for s in json_document("aws/iam-policy-autoscaler.json")["Statement"]}
    assert yaml.safe_load(filled("aws/cluster.yaml"))["cluster_name"] == "fimo"
    end = statements["EndAndTagWorkersOfThisCluster"]
    assert end["Condition"] == {"StringEquals": {"aws:ResourceTag/ray-cluster-name": "fimo"}}
    assert statements["GiveWorkersTheirRole"]["Resource"] == "arn:aws:iam::111122223333:role/fimo-worker"
    start = statements["StartWorkersOfThisCluster"]["Condition"]["StringEquals"]
    types = yaml.safe_load(filled("aws/cluster.yaml"))["available_node_types"]
    for worker in (types["gpu-spot"], types["gpu-on-demand"]):
        assert start["ec2:InstanceType"] == worker["node_config"]["InstanceType"]
        (group,) = worker["node_config"]["SecurityGroupIds"]
        allowed = statements["StartWorkersFromThese"]["Resource"]
        assert [arn for arn in allowed if ":security-group/" in arn] == [
            f"arn:aws:ec2:us-east-1:111122223333:security-group/{group}"
        ]


def test_s3_accepts_the_lifecycle_rules() -> None:
    client = boto3.session.Session().client("s3", region_name="us-east-1")
    shape = client.meta.service_model.operation_model("PutBucketLifecycleConfiguration").input_shape
    rules = json_document("aws/lifecycle.json")
    request = {"Bucket": "my-bucket", "LifecycleConfiguration": rules}
    report = botocore.validate.ParamValidator().validate(request, shape)
    assert not report.has_errors(), report.generate_report()
    unfinished, probes = rules["Rules"]
    assert unfinished["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 1}
    assert PROBE.startswith(probes["Filter"]["Prefix"])
    assert not any(key.startswith(probes["Filter"]["Prefix"]) for key in (PART, TABLE, SPEC))


def test_no_file_of_deploy_holds_a_credential_or_an_account() -> None:
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            text = path.read_text()
            assert not re.search(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b", text), path
            assert not re.search(r"arn:aws:iam::\d{12}", text), path
