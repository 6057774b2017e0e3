"""``examples/concrete.ipynb`` runs from top to bottom, and is kept without what it printed."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOK = "concrete.ipynb"


def test_the_notebook_is_short_and_kept_without_outputs() -> None:
    notebook = nbformat.read(EXAMPLES / NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) <= 20
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), cell.source


@pytest.mark.long
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    folder = tmp_path / "examples"
    shutil.copytree(EXAMPLES, folder)
    notebook = nbformat.read(folder / NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=180, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()
    said = "".join(
        str(output.get("text", "")) for cell in notebook.cells for output in cell.get("outputs", []) if cell.outputs
    )
    assert "60 of 60 cells" in said
    drawn = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    # Four of `fimo.plot`, and one of the notebook's own.
    assert len(drawn) == 5
