"""deploy/kind offline: what it applies is valid and is users' manifests but for what a machine of containers lacks.

That the test itself passes in kind is not seen here: there is no Docker engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from fimo.orchestrator.spec.spec import read_file
from tests.deploy.manifests import DEPLOY, yaml_documents

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs the dev extra")

KIND = DEPLOY / "kind"
SCHEMA = json.loads((Path(__file__).parent / "kuberay.schema.json").read_text())


def made(*arguments: str) -> list[Any]:
    variables = {"IMAGE": "fimo:x", "STORE_IMAGE": "fimo:store", "PATH": os.environ["PATH"]}
    command = [sys.executable, str(KIND / "manifests.py"), *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def test_what_is_applied_is_valid_and_names_no_role_of_aws() -> None:
    documents = made("base")
    for document in documents:
        kubernetes_validate.validate(document, "1.34", strict=True)
    assert [d["kind"] for d in documents][-2:] == ["Pod", "Service"]
    assert "role-arn" not in json.dumps(documents)
    pod = documents[-2]
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert pod["metadata"]["labels"]["app.kubernetes.io/part-of"] == "fimo"


def test_the_job_is_users_job_but_for_gpus_nodes_sizes_and_the_store() -> None:
    (job,) = made("job", "whole", "somewhere")
    jsonschema.validate(job, SCHEMA)
    (users,) = yaml_documents("kuberay/rayjob.yaml")
    same = {k: v for k, v in users["spec"].items() if k not in ("rayClusterSpec", "entrypoint", "submitterPodTemplate")}
    assert {k: job["spec"][k] for k in same} == same
    assert job["spec"]["entrypoint"] == "fimo run sweep.yaml --store s3://fimo/somewhere --address auto"
    cluster = job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] == 2
    for template in (cluster["headGroupSpec"]["template"], group["template"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template["metadata"]}}
        kubernetes_validate.validate({**pod, "spec": template["spec"]}, "1.34", strict=True)
        assert "nodeSelector" not in template["spec"]
        names = {entry["name"] for entry in template["spec"]["containers"][0]["env"]}
        assert {"AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "RAY_AUTH_TOKEN"} <= names
    worker = group["template"]["spec"]["containers"][0]
    assert {"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": "100"} in worker["env"]
    assert "${" not in json.dumps(job)
    assert "nvidia.com" not in json.dumps(job)


def test_its_sweep_is_a_spec_that_measures_nothing_for_itself() -> None:
    spec = read_file(KIND / "sweep.yaml")
    assert "auto" not in (spec.resources.replicas, spec.resources.shard)


def test_without_the_programs_it_is_skipped_with_a_line(tmp_path: Path) -> None:
    (tmp_path / "docker").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "docker").chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", str(KIND / "test.sh")], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "test-kind: skipped, kind is not here\n")
    for name in ("kind", "kubectl", "helm"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 9\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", str(KIND / "test.sh")], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "test-kind: skipped, no Docker engine answers\n")


KUBECTL = """#!{python}
import io, json, pathlib, sys, tarfile
folder, words = pathlib.Path({folder!r}), sys.argv[1:]
line = " ".join(words)
with open(folder / "calls", "a") as file:
    file.write(line + "\\n")
def count(name):
    path = folder / name
    n = int(path.read_text()) + 1 if path.exists() else 1
    path.write_text(str(n))
    return n
if "get rayjob" in line and "jsonpath" in line:
    print("Running" if count("looks") % 2 else "Complete", end="")
elif "fimo status" in line:
    undisturbed = "/whole/" in line
    print(json.dumps({{"parts": 30 if undisturbed else min(30, 4 * count("status"))}}))
    sys.exit(0 if undisturbed else 3)
elif "get pods" in line and "-o name" in line:
    print("pod/one\\npod/two")
elif "fimo pull" in line:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for number in range(9):
            other = number == 5 and "disturbed" in line and (folder / "broken").exists()
            data = b"another table" if other else b"a table"
            entry = tarfile.TarInfo(f"table-{{number}}.parquet")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        data = line.encode()
        entry = tarfile.TarInfo("costs.parquet")
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
    sys.stdout.buffer.write(raw.getvalue())
elif line == "apply -f -":
    sys.stdin.read()
"""


@pytest.mark.parametrize("broken", [False, True], ids=["equal", "another table"])
def test_its_course_on_a_cluster_that_is_played(tmp_path: Path, broken: bool) -> None:
    """The script's own logic: it deletes two pods midway, cleans up, and fails if a table differs."""
    (tmp_path / "kubectl").write_text(KUBECTL.format(python=sys.executable, folder=str(tmp_path)))
    for name in ("docker", "kind", "helm", "sleep"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\n')
    for name in ("kubectl", "docker", "kind", "helm", "sleep"):
        (tmp_path / name).chmod(0o755)
    if broken:
        (tmp_path / "broken").touch()
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        ["/bin/bash", str(KIND / "test.sh")], env=variables, capture_output=True, text=True, check=False, timeout=120
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    assert (done.returncode == 0) is not broken, done.stderr
    assert ("9 tables equal byte for byte" in done.stdout) is not broken
    deleted = [line for line in calls if line.startswith("-n fimo delete pod/")]
    assert deleted == [
        "-n fimo delete pod/one --wait=false",
        "-n fimo delete pod/two --grace-period=0 --force",
    ]
    assert [line for line in calls if line.startswith("kind ")][-1] == "kind delete cluster --name fimo-test"
    assert not list(tmp_path.glob("tmp.*")), "its files are gone"
