"""The container image's recipe, read: building it needs a network and a Docker daemon, which tests do not have."""

from __future__ import annotations

import re
import tomllib

from tests.deploy.manifests import DEPLOY, ROOT

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
LOCK = (ROOT / "requirements.lock").read_text().splitlines()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _argument(name: str) -> str:
    (value,) = set(re.findall(rf"^ARG {name}=(\S+)$", DOCKERFILE, re.MULTILINE))
    return value


def _pinned(package: str) -> str:
    (version,) = [line.partition("==")[2] for line in LOCK if line.startswith(f"{package}==")]
    return version


def test_the_image_has_the_pinned_ray_and_torch_on_python_3_11() -> None:
    assert _argument("RAY_VERSION") == _pinned("ray")
    assert _argument("TORCH_VERSION") == _pinned("torch")
    assert "FROM rayproject/ray:${RAY_VERSION}-py311-${DEVICE}" in DOCKERFILE
    assert "ray-ml" not in DOCKERFILE
    assert _argument("DEVICE") == "cpu"


def test_the_image_has_every_folder_that_the_package_is_mapped_from() -> None:
    for folder in PYPROJECT["tool"]["setuptools"]["package-dir"].values():
        assert f"COPY --chown=ray:users {folder} /home/ray/fimo/{folder}\n" in DOCKERFILE


def test_the_build_context_holds_what_is_copied_and_no_more() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    assert rules[0] == "*"
    admitted = {line.removeprefix("!") for line in rules if line.startswith("!")}
    copied = set()
    for line in re.findall(r"^COPY --chown=\S+ (.+) \S+$", DOCKERFILE, re.MULTILINE):
        copied |= set(line.split())
    assert copied == admitted


def test_nothing_runs_as_root_and_tokens_are_on() -> None:
    assert re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)[-1] == "ray"
    assert "RAY_AUTH_MODE=token" in DOCKERFILE
