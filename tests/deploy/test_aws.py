"""The AWS files, offline: Ray's own schema for the cluster, and what each policy lets whom do."""

from __future__ import annotations

import fnmatch
import json
import re
from typing import Any

import boto3
import botocore.validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.store.base import PROBE_PREFIX
from fimo.orchestrator.sweep import keys
from tests.deploy.manifests import DEPLOY, filled, json_document

IDENTITY_POLICIES = ["aws/iam-policy.json", "aws/iam-policy-driver.json", "aws/iam-policy-autoscaler.json"]
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


def test_the_cluster_is_closed_on_demand_at_the_head_and_spot_elsewhere() -> None:
    config = yaml.safe_load(filled("aws/cluster.yaml"))
    types = config["available_node_types"]
    head, worker = types["head"], types["gpu-spot"]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert worker["min_workers"] == 0
    # Without a profile Ray makes a role with full access to EC2 and S3.
    assert head["node_config"]["IamInstanceProfile"] != worker["node_config"]["IamInstanceProfile"]
    assert all(t["node_config"]["MetadataOptions"]["HttpTokens"] == "required" for t in types.values())
    (rule,) = config["provider"]["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
    assert rule["IpRanges"] == [{"CidrIp": "192.0.2.7/32"}]
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])


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
    for key in (PART, WITNESS, ESTIMATE, FAILED, HEARTBEAT, PROBE):
        assert allows(DRIVER, "s3:DeleteObject", key)
    for key in (SPEC, TABLE, REJECTED):
        assert not allows(DRIVER, "s3:DeleteObject", key)
    for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject"):
        assert not allows(DRIVER, action, FOREIGN)


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
    assert start["ec2:InstanceType"] == types["gpu-spot"]["node_config"]["InstanceType"]


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
