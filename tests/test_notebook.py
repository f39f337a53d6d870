"""The quickstart notebook runs from nothing, and shows the outputs that it really gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "quickstart.ipynb"
# Smaller than in the notebook, whose own settings take minutes: every cell is executed all the same.
QUICKER = {
    '"data": "glyphs:7200"': '"data": "glyphs:144"',
    '"teacher_epochs": 2': '"teacher_epochs": 1',
    '"kd@1/9x6"': '"kd@1/2x1"',
    '"none@1x3"': '"none@1x1"',
    '"max_low": 12': '"max_low": 4',
}


def cells() -> list[Any]:
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


def test_every_cell_of_the_notebook_runs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        for ours, quicker in QUICKER.items():
            cell.source = cell.source.replace(ours, quicker)
    sources = "\n".join(cell.source for cell in notebook.cells)
    assert all(quicker in sources for quicker in QUICKER.values()), "the notebook's settings have changed"
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute()


def test_the_committed_outputs_are_whole() -> None:
    for number, cell in enumerate(cells(), 1):
        assert cell.execution_count == number
        assert cell.outputs
        assert not [output for output in cell.outputs if output.output_type == "error"]
    winner = next(output for output in cells()[0].outputs if "data" in output)
    assert winner.data["text/plain"].startswith("Network(architecture=")
