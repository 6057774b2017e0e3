"""``fimo list``: what a store holds, as each sweep's own status has it, for the price of one listing."""

from __future__ import annotations

import json
import shutil

import pytest

from fimo.orchestrator.commands import app
from fimo.orchestrator.report.sweeps import sweeps_table
from fimo.orchestrator.run import estimating
from fimo.orchestrator.run.listing import sweeps
from fimo.orchestrator.run.status import sweep_status
from fimo.orchestrator.store import MemoryStore, open_store
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.errors import DivergedError
from tests.support.small_sweep import OWN, make_spec, run_here

LONG = "a-name-of-a-sweep-" * 5


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> MemoryStore:
    """Whole, interrupted, estimated only, failed, and something foreign that is called like a sweep."""
    beside, store = tmp_path_factory.mktemp("of") / "spec", MemoryStore()
    shutil.copytree(OWN, beside)
    run_here(make_spec(name="whole"), beside, store)
    turns = iter([None] * 5 + ["stopped"] * 99)
    run_here(make_spec(name=LONG), beside, store, should_stop=lambda: next(turns))
    run_here(make_spec(name="estimated"), beside, store, shards=False)

    def fails(*_args):
        raise DivergedError("no")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimating, "asked", fails)
        run_here(make_spec(name="failed", seeds=2), beside, store)
    store.put("foreign/sweep.json", b"{}")
    store.put("folder/other.json", b"{}")
    return store


def test_each_row_is_what_the_sweep_s_own_status_says(filled):
    found = {row["name"]: row for row in sweeps(filled)}
    assert set(found) == {"whole", LONG, "estimated", "failed", "foreign"}
    assert found["foreign"]["state"] == "unreadable"
    states = {"whole": "complete", LONG: "incomplete", "estimated": "estimated only", "failed": "failed"}
    for name, state in states.items():
        row, status = found[name], sweep_status(Sweep(filled, name))
        assert row["state"] == state
        assert (row["cells"], row["done"], row["complete"]) == (status["cells"], status["done"], status["complete"])
        assert (row["seeds"], row["seeds_complete"]) == (status["seeds"], status["seeds_complete"])
        assert row["failed"] == len(status["failed"])
        written = max(entry.modified for entry in filled.list(f"{name}/"))
        assert row["last_write"] == written.isoformat(timespec="seconds")
    assert 0 < found[LONG]["done"] < 20


def test_one_listing_and_no_part_is_read(filled, monkeypatch):
    asked, read = [], []
    real_list, real_get = filled.list, filled.get
    monkeypatch.setattr(filled, "list", lambda prefix: (asked.append(prefix), real_list(prefix))[1])
    monkeypatch.setattr(filled, "get", lambda key: (read.append(key), real_get(key))[1])
    sweeps(filled)
    assert asked == [""]
    assert not [key for key in read if key.endswith(".parquet")]


def test_the_table_fits_eighty_columns_whatever_sweeps_are_called(filled):
    from io import StringIO

    from rich.console import Console

    text = StringIO()
    Console(file=text, width=80).print(sweeps_table(sweeps(filled), "runs"))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in text.getvalue()
    for whole in ("20/20", "estimated only", "incomplete", "unreadable", "0/20"):
        assert whole in text.getvalue()
    folded = "".join(line.split("│")[1].strip() for line in lines if line.count("│") > 2)
    assert LONG in folded


def test_a_store_from_a_shell(beside, tmp_path, shell):
    run_here(make_spec(), beside, open_store(str(tmp_path / "runs")))
    told = shell("list", tmp_path / "runs")
    assert (told.code, "flowers" in told.out) == (0, True)
    values = json.loads(shell("list", tmp_path / "runs", "--json").out)
    assert [row["name"] for row in values["sweeps"]] == ["flowers"]
    assert app.out is not None


@pytest.mark.parametrize(
    ("where", "code", "said"),
    [
        ("nowhere", 2, "is no folder"),
        ("runs/flowers", 0, "is a sweep"),
        (".", 0, "`fimo list ./runs`"),
        ("empty", 0, "`fimo run SPEC --store empty` starts one"),
    ],
)
def test_a_folder_without_sweeps_is_one_line_that_says_where_they_are(
    beside, tmp_path, shell, monkeypatch, where, code, said
):
    run_here(make_spec(seeds=1), beside, open_store(str(tmp_path / "runs")))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec").rename(tmp_path / "runs" / "spec")
    told = shell("list", where)
    assert (told.code, told.out, len(told.err.splitlines())) == (code, "", 1)
    assert said in told.err
