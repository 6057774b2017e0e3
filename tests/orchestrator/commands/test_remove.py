"""``fimo remove``: all of a sweep goes, nothing beside it, and never what is no sweep."""

from __future__ import annotations

import json
import sys

import pytest

from fimo.orchestrator.run.status import sweep_status
from fimo.orchestrator.store import LocalStore, MemoryStore, open_store
from fimo.orchestrator.sweep import remove as removing
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.errors import StoreError, UsageError
from tests.orchestrator.store.conftest import s3_environment, seaweed, store  # noqa: F401  (fixtures)
from tests.support.small_sweep import OWN, make_spec, run_here

NEIGHBOURS = ("flowers-2/sweep.json", "flowers.parquet", "flower/sweep.json", "flowers2/parts/x", "a")


@pytest.fixture(scope="module")
def objects() -> dict[str, bytes]:
    """A whole sweep's."""
    _, made, _ = run_here(make_spec(), OWN)
    return {entry.key: made.get(entry.key) for entry in made.list("")}


def filled(into, objects, *more: str) -> Sweep:
    for key, data in {**objects, **dict.fromkeys(more, b"{}")}.items():
        into.put(key, data)
    return Sweep(into, "flowers")


def test_a_sweep_goes_whole_and_its_neighbours_stay(store, objects):  # noqa: F811
    sweep = filled(store, objects, *NEIGHBOURS)
    removing.remove(sweep, removing.contents(sweep))
    assert sorted(entry.key for entry in store.list("")) == sorted(NEIGHBOURS)
    if isinstance(store, LocalStore):
        assert not (store.root / "flowers").exists()
        assert (store.root / "flowers2" / "parts" / "x").read_bytes() == b"{}"


@pytest.mark.parametrize("content", [None, b"{", b"[]", b'{"name": "x"}', b"[" * 100_000])
def test_what_is_no_sweep_of_fimo_is_refused_and_stays(tmp_path, content):
    folder = open_store(str(tmp_path))
    folder.put("thesis/chapter.tex", b"years of work")
    if content is not None:
        folder.put("thesis/sweep.json", content)
    with pytest.raises(UsageError, match="nothing is removed") as caught:
        removing.contents(Sweep(folder, "thesis"))
    assert "\n" not in str(caught.value)
    assert folder.get("thesis/chapter.tex") == b"years of work"


def test_a_store_is_no_sweep(objects, tmp_path, shell):
    filled(open_store(str(tmp_path / "runs")), objects)
    assert shell("remove", tmp_path / "runs", "--yes").code == 2
    assert shell("remove", f"{tmp_path}/runs/flower", "--yes").code == 2
    assert shell("status", f"{tmp_path}/runs/flowers").code == 0


@pytest.mark.parametrize("fails_after", [0, 1, 9, 27])
def test_an_interrupted_removal_never_looks_whole_and_can_be_resumed_or_finished(objects, fails_after, monkeypatch):
    """Killed after any number of deletions: the sweep lacks what is gone, and says so."""
    sweep = filled(memory := MemoryStore(), objects)
    entries = removing.contents(sweep)
    assert len(entries) > 28
    real, gone = memory.delete, []

    def delete(key):
        if len(gone) >= fails_after:
            raise StoreError("the server is gone")
        gone.append(key)
        real(key)

    monkeypatch.setattr(memory, "delete", delete)
    with pytest.raises(StoreError):
        removing.remove(sweep, entries)
    monkeypatch.undo()
    parts = [key for key in gone if "/parts/" in key]
    status = sweep_status(sweep)
    assert status["complete"] == (not any(kind in key for key in gone for kind in ("/parts/", "/estimates/")))
    assert (status["done"] < 20) == bool(parts)
    if gone:
        assert gone[0] == "flowers/tables/made-from.json", "no table may tell of results that are gone"
    again = [entry.key for entry in removing.contents(sweep)]
    assert "flowers/sweep.json" in again
    removing.remove(sweep, removing.contents(sweep))
    assert list(memory.list("")) == []


def test_what_is_written_meanwhile_is_told_and_the_sweep_can_be_removed_again(objects):
    sweep = filled(memory := MemoryStore(), objects)
    entries = removing.contents(sweep)
    memory.put("flowers/parts/x/late", b"x")
    with pytest.raises(StoreError, match="1 objects were written while it was removed"):
        removing.remove(sweep, entries)
    removing.remove(sweep, removing.contents(sweep))
    assert list(memory.list("")) == []


def test_nobody_to_ask_removes_nothing_without_yes(objects, tmp_path, shell):
    filled(open_store(str(tmp_path / "runs")), objects)
    refused = shell("remove", f"{tmp_path}/runs/flowers")
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert "--yes" in refused.err
    assert shell("status", f"{tmp_path}/runs/flowers").code == 0
    done = shell("remove", f"{tmp_path}/runs/flowers", "--yes", "--json")
    assert (done.code, json.loads(done.out)["objects"] > 10) == (0, True)
    assert shell("status", f"{tmp_path}/runs/flowers").code == 2


@pytest.mark.parametrize(("answer", "code", "left"), [("n\n", 3, 0), ("\n", 3, 0), ("y\n", 0, 2)])
def test_on_a_terminal_it_asks_with_name_objects_and_bytes(objects, tmp_path, shell, monkeypatch, answer, code, left):
    import io

    filled(open_store(str(tmp_path / "runs")), objects)
    terminal = io.StringIO(answer)
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", terminal)
    total = sum(f.stat().st_size for f in (tmp_path / "runs" / "flowers").rglob("*") if f.is_file())
    said = shell("remove", f"{tmp_path}/runs/flowers")
    assert said.code == code
    assert f"{tmp_path}/runs/flowers" in said.err
    assert f"{total:,} bytes" in said.err
    assert shell("status", f"{tmp_path}/runs/flowers").code == left
