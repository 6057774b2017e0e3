"""A user's module beside the spec is found and called, and each mistake is one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fimo.workers.errors import FimoError, UsageError, WorkloadError
from fimo.workers.workload import Workload, find_module, load_workload

MODULE = """
import torch
from fimo.workers.workload import Workload

SCALE = {scale}

def make(width=2, fail=False):
    if fail:
        raise ValueError("first line\\nsecond line")
    model = torch.nn.Linear(width, 1)
    data = {{"x": torch.full((3, width), SCALE), "y": torch.zeros(3)}}
    return Workload(model, data, data, lambda m, b: m(b["x"]).squeeze(-1), lambda o, b: (o - b["y"]) ** 2)

def wrong():
    return 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path, modules = list(sys.path), set(sys.modules)
    (tmp_path / "my_fimo_workload.py").write_text(MODULE.format(scale=1.0))
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def test_a_module_beside_the_spec(folder: Path) -> None:
    workload = load_workload("my_fimo_workload:make", {"width": 5}, folder)
    assert isinstance(workload, Workload)
    assert workload.train["x"].shape == (3, 5)


def test_another_folders_module_of_the_same_name_is_not_mistaken_for_it(folder: Path) -> None:
    other = folder / "other"
    other.mkdir()
    (other / "my_fimo_workload.py").write_text(MODULE.format(scale=2.0))
    for place, scale in ((folder, 1.0), (other, 2.0), (folder, 1.0)):
        workload = load_workload("my_fimo_workload:make", {}, place)
        assert workload.train["x"][0, 0] == scale


def test_an_installed_module(tmp_path: Path) -> None:
    assert find_module("fimo.workers.workloads.tabular:concrete", tmp_path)[2] is None
    assert isinstance(load_workload("fimo.workers.workloads.tabular:concrete", {}, tmp_path), Workload)


def test_an_argument_annotated_as_a_path_is_looked_for_beside_the_spec(folder: Path, monkeypatch) -> None:
    made = MODULE.format(scale=1.0).replace(
        "def make(width=2, fail=False):", "def make(data: Path, name: str, **more):"
    )
    text = made.replace(
        '    if fail:\n        raise ValueError("first line\\nsecond line")\n', "    GIVEN.update(locals())\n"
    )
    text = text.replace("width", "2").replace("import torch", "import torch\nfrom pathlib import Path\nGIVEN = {}", 1)
    for number, future in enumerate(("", "from __future__ import annotations\n")):
        (folder / f"paths{number}.py").write_text(future + text)
        (folder / "here.csv").write_text("")
        monkeypatch.chdir(folder.parent)
        for given, found in (
            ("here.csv", folder / "here.csv"),
            (str(folder / "here.csv"), folder / "here.csv"),
            ("there.csv", Path("there.csv")),
        ):
            load_workload(f"paths{number}:make", {"data": given, "name": "here.csv"}, folder)
            kept = sys.modules[f"paths{number}"].GIVEN
            assert (kept["data"], kept["name"]) == (found, "here.csv")


@pytest.mark.parametrize(
    ("reference", "arguments", "kind", "says"),
    [
        ("my_fimo_workload", {}, UsageError, "not of the form module:function"),
        (":make", {}, UsageError, "not of the form module:function"),
        ("absent_module:make", {}, UsageError, "'absent_module' not found"),
        ("my_fimo_workload:mak", {}, UsageError, "no function 'mak' (did you mean 'make'?)"),
        ("my_fimo_workload:make", {"fail": True}, WorkloadError, "failed: ValueError: first line"),
        ("my_fimo_workload:make", {"widht": 2}, UsageError, "widht"),
        ("my_fimo_workload:wrong", {}, WorkloadError, "returned int"),
        ("broken:make", {}, WorkloadError, "'broken' failed to import: SyntaxError"),
        ("needs:make", {}, WorkloadError, "'needs' needs 'absent_package', which is not installed"),
    ],
)
def test_each_mistake_is_one_line(folder: Path, reference, arguments, kind: type[FimoError], says: str) -> None:
    (folder / "broken.py").write_text("def make(:")
    (folder / "needs.py").write_text("import absent_package")
    with pytest.raises(kind) as error:
        load_workload(reference, arguments, folder)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


FORGED = """
open({mark!r}, 'w').close()
from fimo import Workload

def honest(n=3) -> Workload: ...
def other(n=3): ...
def _hidden(n=3) -> Workload: ...
honest_too = honest
"""


@pytest.mark.parametrize("function", ["other", "_hidden", "honest_too", "Workload", "absent", "__name__"])
def test_an_installed_module_is_read_before_it_is_imported(tmp_path: Path, monkeypatch, function: str) -> None:
    """Importing a module runs what stands in it, and its packages': a stranger's spec must not have that done."""
    mark, package = tmp_path / "imported", tmp_path / "installed" / "forged_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    (package / "forged.py").write_text(FORGED.format(mark=str(mark)))
    monkeypatch.syspath_prepend(package.parent)
    for name in ("forged_package", "forged_package.forged"):
        sys.modules.pop(name, None)
    with pytest.raises(UsageError):
        load_workload(f"forged_package.forged:{function}", {}, tmp_path)
    assert not mark.exists()
    with pytest.raises(WorkloadError, match="returned NoneType"):
        load_workload("forged_package.forged:honest", {}, tmp_path)
    assert mark.exists()


@pytest.mark.parametrize("name", ["json", "random", "this"])
def test_a_module_beside_the_spec_does_not_hide_one_of_python_s_own(folder: Path, name: str) -> None:
    kept = sys.modules.get(name)
    (folder / f"{name}.py").write_text(MODULE.format(scale=1.0))
    with pytest.raises(UsageError, match="has the name of a module of Python's own"):
        load_workload(f"{name}:make", {}, folder)
    assert sys.modules.get(name) is kept


def test_a_misspelt_field_is_named(folder: Path) -> None:
    text = MODULE.format(scale=1.0).replace("lambda o, b: (o", "losss=lambda o, b: (o")
    (folder / "misspelt.py").write_text(text)
    with pytest.raises(WorkloadError, match=r"did you mean 'loss'\?"):
        load_workload("misspelt:make", {}, folder)
