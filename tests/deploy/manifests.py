"""The manifests of deploy/, filled in as a user's `envsubst` does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"

VALUES = {
    "ACCELERATOR": "A10G",
    "ACCOUNT": "111122223333",
    "ADMIN_CIDR": "192.0.2.7/32",
    "AMI": "ami-0123456789abcdef0",
    "BUCKET": "my-bucket",
    "DRIVER_ROLE_ARN": "arn:aws:iam::111122223333:role/fimo-driver",
    "HEAD_PROFILE_ARN": "arn:aws:iam::111122223333:instance-profile/fimo-driver",
    "IMAGE": "registry.example/fimo:0.1.0-gpu",
    "KMS_KEY_ARN": "arn:aws:kms:us-east-1:111122223333:key/1234abcd",
    "PREFIX": "runs",
    "REGION": "us-east-1",
    "REGISTRY": "registry.example",
    "SECURITY_GROUP": "sg-0123456789abcdef0",
    "STORE": "s3://my-bucket/runs",
    "WORKER_PROFILE_ARN": "arn:aws:iam::111122223333:instance-profile/fimo-worker",
    "WORKER_ROLE_ARN": "arn:aws:iam::111122223333:role/fimo-worker",
}

PLACEHOLDER = re.compile(r"\$\{(\w+)\}")


def filled(path: str) -> str:
    """A file of deploy/ with every ${NAME} replaced; a KeyError for a name that is not in VALUES."""
    return PLACEHOLDER.sub(lambda match: VALUES[match[1]], (DEPLOY / path).read_text())


def yaml_documents(path: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(filled(path)))


def json_document(path: str) -> dict[str, Any]:
    return json.loads(filled(path))
