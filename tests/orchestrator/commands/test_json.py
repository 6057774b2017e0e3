"""``--json`` is one JSON object on stdout and nothing else, of every command; what a program reads is in it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import typer.main

from fimo.orchestrator.cluster import doctor, jobs
from fimo.orchestrator.commands.main import app
from fimo.orchestrator.spec.spec import read_file
from fimo.orchestrator.store import open_store
from tests.support.shell import Shell, shell

__all__ = ["shell"]

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
HEAD = "http://127.0.0.1:8265"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_it(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    assert "--json" in [option for parameter in command.params for option in parameter.opts]


def test_init_names_the_files_that_it_wrote(tmp_path: Path, shell: Shell) -> None:
    done = shell("init", "tabular", "--name", "told_in_json", "--to", tmp_path / "there", "--json")
    told = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert (told["kind"], told["name"]) == ("tabular", "told_in_json")
    assert read_file(Path(told["spec"])).workload == "told_in_json:workload"
    assert all(Path(told[key]).is_file() for key in ("spec", "module", "schema"))


def test_schema_is_the_same_object_with_it_and_without(shell: Shell) -> None:
    plain, asked = shell("schema"), shell("schema", "--json")
    assert plain.out == asked.out
    assert json.loads(asked.out)["properties"]["removals"]


class Client:
    """A head that has one job's output."""

    def get_job_logs(self, number: str) -> str:
        return f"{number}: 4 of 20 cells done\n"

    async def tail_job_logs(self, number: str) -> AsyncIterator[str]:
        for line in (self.get_job_logs(number), 'then "the end"\n'):
            yield line


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A sweep with two jobs in its store; the later one is the one that is meant."""
    store = open_store(str(tmp_path / "runs"))
    for hour, number in ((1, "fimo-mine-early"), (2, "fimo-mine-late")):
        job = {"id": number, "address": HEAD, "when": f"2026-01-01T0{hour}:00:00", "beside": ".", "renamed": {}}
        store.put(f"mine/jobs/{number}.json", json.dumps(job).encode())
    monkeypatch.setattr(jobs, "connect", lambda address: Client())
    return str(tmp_path / "runs" / "mine")


@pytest.mark.parametrize(("follow", "end"), [([], ""), (["--follow"], 'then "the end"\n')])
def test_logs_is_one_object_with_the_job_and_its_text(
    submitted: str, shell: Shell, follow: list[str], end: str
) -> None:
    asked = ("logs", submitted, "--address", HEAD, *follow)
    plain, done = shell(*asked), shell(*asked, "--json")
    assert plain.out == f"fimo-mine-late: 4 of 20 cells done\n{end}"
    assert json.loads(done.out) == {"sweep": submitted, "job": "fimo-mine-late", "text": plain.out}
    early = json.loads(shell(*asked, "--job", "fimo-mine-early", "--json").out)
    assert (early["job"], early["text"]) == ("fimo-mine-early", f"fimo-mine-early: 4 of 20 cells done\n{end}")


@pytest.mark.parametrize("good", [True, False])
def test_the_doctor_s_object_has_its_exit_code(good: bool, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda store, address, say: [doctor.Check("one", good, "said")])
    done = shell("doctor", "--json")
    assert json.loads(done.out)["exit_code"] == done.code == (0 if good else 1)


@pytest.mark.parametrize(("estimators", "code"), [("[grad_dot]", 0), ("[unrolled]", 2)])
def test_a_plan_s_object_has_its_exit_code(estimators: str, code: int, tmp_path: Path, shell: Shell) -> None:
    (tmp_path / "normed.py").write_text(
        "import torch\n"
        "from fimo import Workload\n\n\n"
        "def made():\n"
        "    torch.manual_seed(0)\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))\n"
        "    x = torch.randn(20, 3)\n"
        "    data = {'x': x, 'y': x[:, 0]}\n"
        "    return Workload(model, data, data, lambda m, b: m(b['x'])[:, 0], lambda o, b: (o - b['y']) ** 2)\n"
    )
    (tmp_path / "normed.yaml").write_text(
        "name: normed\nworkload: normed:made\nremovals: {indices: [0, 1]}\nseeds: 1\n"
        "further_training: {optimizer: {name: sgd, lr: 0.01}, batch_size: 6, epochs: 1}\n"
        f"estimators: {estimators}\n"
    )
    done = shell("plan", tmp_path / "normed.yaml", "--json")
    assert json.loads(done.out)["exit_code"] == done.code == code, done.err
