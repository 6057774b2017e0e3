"""deploy/README.md: what it names exists, and what its files need it gives."""

from __future__ import annotations

import re

from tests.deploy.manifests import DEPLOY, PLACEHOLDER, ROOT, VALUES

README = (DEPLOY / "README.md").read_text()
COMMANDS = {"plan", "run", "submit", "status", "resume", "cancel", "logs", "pull", "report", "search", "doctor"}
COMMANDS |= {"estimate", "import-scores", "verify"}


def test_every_file_it_names_exists() -> None:
    named = set(re.findall(r"\bdeploy/[\w./-]+\w", README)) | {
        f"deploy/aws/{n}" for n in re.findall(r"fill ([\w.-]+)", README)
    }
    assert len(named) > 8
    for path in named:
        assert (ROOT / path).exists(), path
    for row in re.findall(r"^\| `([\w.-]+\.json)` \|", README, re.MULTILINE):
        assert (DEPLOY / "aws" / row).exists(), row


def test_every_file_of_deploy_is_in_it() -> None:
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".yaml", ".py") and "__pycache__" not in path.parts:
            assert path.name in README, path


def test_its_links_lead_to_its_headings() -> None:
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    }
    links = re.findall(r"\]\(#([^)]+)\)", README)
    assert links
    assert set(links) <= anchors


def test_its_fimo_commands_are_fimos() -> None:
    used = set(re.findall(r"(?:^|`)fimo ([a-z-]+)", README, re.MULTILINE))
    assert {"doctor", "plan", "submit", "status", "resume", "pull"} <= used <= COMMANDS


def test_every_variable_that_a_file_needs_is_set_in_it_and_given_to_envsubst() -> None:
    given = {name for group in re.findall(r"envsubst '([^']+)'", README) for name in re.findall(r"\$(\w+)", group)}
    # The head of rayjob.yaml gives the one command that the walk leaves to it.
    given |= set(
        re.findall(r"\$(\w+)", re.findall(r"envsubst '([^']+)'", (DEPLOY / "kuberay/rayjob.yaml").read_text())[0])
    )
    exported = set(re.findall(r"\b([A-Z_]+)=", README))
    for path in [*DEPLOY.glob("aws/*"), *DEPLOY.glob("kuberay/*")]:
        for name in PLACEHOLDER.findall(path.read_text()):
            assert name in VALUES
            assert name in given, f"{path.name}: {name}"
            assert name in exported, f"{path.name}: {name}"
