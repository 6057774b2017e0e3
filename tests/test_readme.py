"""What the README shows works: its links, its own sweep, its examples."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.spec.spec import read

from tests.support.small_sweep import run_here

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "deploy/README.md", "workers/workloads/data/README.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not link.startswith("http"):
            assert ((ROOT / page).parent / link).exists(), link


def test_the_own_sweep_is_thirty_lines_and_runs(tmp_path):
    [module], [spec] = blocks("python"), blocks("yaml")
    assert len((module + spec).strip().splitlines()) <= 32
    (tmp_path / "mine.py").write_text(module)
    report, _, _ = run_here(read(spec), tmp_path)
    assert report.exit_code == 0
    assert report.gathered.tables["scores"].num_rows > 0


@pytest.mark.parametrize("example", sorted(p.name for p in (ROOT / "examples").glob("*.yaml")))
def test_examples_resolve(example):
    path = ROOT / "examples" / example
    resolved = resolve(read(path.read_text()), path.parent)
    assert resolved.manifest.removals


def test_the_paper_s_setting_is_the_paper_s():
    path = ROOT / "examples" / "concrete-paper.yaml"
    resolved = resolve(read(path.read_text()), path.parent)
    training = resolved.spec.further_training
    assert [r.indices for r in resolved.manifest.removals] == [(i,) for i in range(0, 900, 9)]
    assert (resolved.spec.seeds.count, training.epochs, training.batch_size) == (100, 500, 128)
    assert (training.optimizer.name, training.optimizer.lr, training.removal_mode) == ("sgd", 0.03, "drop")
    assert resolved.manifest.steps == tuple(range(8, 4001, 8))


def test_every_command_that_the_readme_names_exists():
    from fimo.orchestrator.commands.main import app
    from typer.main import get_command

    known = set(get_command(app).commands)
    named = set(re.findall(r"(?:^|`|bin/)fimo ([a-z-]+) ", README, re.MULTILINE))
    assert named <= known
    assert {"plan", "run", "status", "resume", "pull", "estimate", "import-scores"} <= known
