"""What the documents show works: links, module paths, the README's own sweep, notebook and examples."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.spec.removals import number_removals
from fimo.orchestrator.spec.spec import parse, read
from fimo.orchestrator.spec.yaml import read_yaml
from fimo.orchestrator.store import open_store
from fimo.workers.errors import UsageError
from fimo.workers.workload import load_workload
from tests.support.small_sweep import SPEC, run_here

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


PAGES = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "deploy/README.md",
    "docs/contract.md",
    "docs/cost-of-trust.md",
    "docs/report.md",
    "docs/estimators.md",
    "docs/spec.md",
    "docs/tutorial.md",
    "docs/workloads.md",
    "workers/workloads/data/README.md",
]
DEFINED = re.compile(r"`((?:fimo|workers|estimators|orchestrator|deploy|tests|examples|benchmarks)/[\w./-]*)`")
ROOM = re.compile(r"`((?:spec|store|sweep|resolve|tables|run|cluster|report|commands)/(?:\w+\.py)?)`")


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert links or page == "workers/workloads/data/README.md"
    for link in links:
        path, _, anchor = link.partition("#")
        if not link.startswith("http"):
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_paths_that_are_named_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in DEFINED.findall(text):
        assert (ROOT / path).exists(), path
    for path in ROOM.findall(text):
        assert (ROOT / "orchestrator" / path).exists(), path


def test_the_architecture_names_every_package_and_every_module_of_workers():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(DEFINED.findall(text))
    inits = [
        path for folder in ("workers", "estimators", "orchestrator") for path in (ROOT / folder).rglob("__init__.py")
    ]
    packages = {f"{path.parent.relative_to(ROOT)}/" for path in inits}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "workers").rglob("*.py") if path.name != "__init__.py"}
    assert modules <= named
    assert packages - {"workers/stacking/", "workers/workloads/"} <= named


def test_the_architecture_s_table_of_objects_is_that_of_the_keys():
    """Key and way of writing, as in the docstring of ``orchestrator/sweep/keys.py``."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `([\w./-]+\.(?:json|parquet)|rejected/KEY)` \|.*\| ([^|]+) \|$", text, re.MULTILINE))
    docstring = ast.get_docstring(ast.parse((ROOT / "orchestrator" / "sweep" / "keys.py").read_text(encoding="utf-8")))
    written = re.findall(r"^ +NAME/(\S+)((?:.*\n)(?: {20,}.*\n)*)", docstring, re.MULTILINE)
    assert len(written) == 16
    assert {key: ways(about) for key, about in written} == {key: ways(way) for key, way in told.items()}


def ways(about: str) -> set[str]:
    return set(re.findall(r"\b(create|put)\b", about))


def test_the_own_sweep_is_thirty_lines_and_runs_and_so_does_the_notebook(tmp_path):
    (module, notebook), (spec, part) = blocks("python"), blocks("yaml")
    training = {**SPEC["further_training"], **read_yaml(part, "README")["further_training"]}
    assert parse({**SPEC, "further_training": training}).further_training.lora.rank == 8
    assert len((module + spec).strip().splitlines()) <= 32
    (tmp_path / "mine.py").write_text(module)
    (tmp_path / "mine.yaml").write_text(spec)
    # Into the store that the notebook names: its run finds everything computed.
    report, _, _ = run_here(read(spec), tmp_path, open_store(str(tmp_path / "runs")))
    assert report.exit_code == 0
    assert report.gathered.tables["scores"].num_rows > 0
    checks = (
        "\nassert a.steps == (7,) and a.effect.shape == a.sem.shape == (2, 1, 40)\nassert again.num_rows == 20 * 5 * 40"
    )
    done = subprocess.run(
        [sys.executable, "-c", notebook + checks],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


EXAMPLES = sorted(p.name for p in (ROOT / "examples").glob("*.yaml"))
SHIPS_ITS_DATA = ("concrete",)


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_resolve_or_say_what_is_to_be_brought(example):
    path = ROOT / "examples" / example
    spec = read(path.read_text())
    if example.startswith(SHIPS_ITS_DATA):
        assert resolve(spec, path.parent).manifest.removals
        return
    # Neither the data nor the final model is here.
    if spec.final_model is not None:
        with pytest.raises(UsageError, match=rf"python -m {spec.workload.partition(':')[0]} --help"):
            resolve(spec, path.parent)
    with pytest.raises(UsageError, match=r"; get .*; it holds ") as caught:
        load_workload(spec.workload, spec.workload_args, path.parent)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("example", EXAMPLES)
def test_what_an_example_removes_is_in_its_data(example):
    spec = read((ROOT / "examples" / example).read_text())
    sizes = {
        "energy": 691,
        "heloc": 8883,
        "income": 30085,
        "cifar10": 50000,
        "tabular": 927,
        "sst2": 67349,
        "causal_lm": 1000,
    }
    module = spec.workload.partition(":")[0].rpartition(".")[2]
    removed = number_removals(spec.removals, sizes[module], lambda name: b"", lambda name: [])
    counts = {"sst2-paper.yaml": 50, "concrete-groups.yaml": 60}
    assert len(removed) == counts.get(example, 100 if "paper" in example else 30)


def test_the_paper_s_setting_is_the_paper_s():
    path = ROOT / "examples" / "concrete-paper.yaml"
    resolved = resolve(read(path.read_text()), path.parent)
    training = resolved.spec.further_training
    assert [r.indices for r in resolved.manifest.removals] == [(i,) for i in range(0, 900, 9)]
    assert (resolved.spec.seeds.count, training.epochs, training.batch_size) == (100, 500, 128)
    assert (training.optimizer.name, training.optimizer.lr, training.removal_mode) == ("sgd", 0.03, "drop")
    assert resolved.manifest.steps == tuple(range(8, 4001, 8))


def test_energy_s_setting_is_the_paper_s():
    spec = read((ROOT / "examples" / "energy-paper.yaml").read_text())
    training = spec.further_training
    assert spec.removals.indices == (*range(0, 693, 7), 690)
    assert (spec.seeds.count, training.epochs, training.batch_size) == (100, 500, 128)
    assert (training.optimizer.name, training.optimizer.lr, training.removal_mode) == ("sgd", 0.03, "drop")


def test_every_command_that_the_readme_names_exists():
    from typer.main import get_command

    from fimo.orchestrator.commands.main import app

    known = set(get_command(app).commands)
    named = set(re.findall(r"(?:^|`|bin/)fimo ([a-z-]+) ", README, re.MULTILINE))
    assert named <= known
    assert {"plan", "run", "status", "resume", "pull", "estimate", "import-scores"} <= known
