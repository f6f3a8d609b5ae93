"""The notebooks of examples/: what they call exists, their outputs are small, and they run from top to bottom."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

import reinforce

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
#: Bytes of a notebook with its outputs.
LARGEST = 200_000


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def code(path: Path) -> list[str]:
    """The Python of each cell, without magics and commands of IPython."""
    cells = ["".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    magic = re.compile(r"^(%.*|!.*(?:\n    --.*)*)$", flags=re.MULTILINE)
    return [magic.sub("", text) for text in cells]


def test_there_are_three() -> None:
    assert [path.stem.partition("-")[0] for path in NOTEBOOKS] == ["1", "2", "3"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_has_outputs_of_one_run_and_calls_only_public_names(path: Path) -> None:
    assert path.stat().st_size < LARGEST
    cells = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    assert "dataset-reinforcement" in "".join(cells[0]["source"])
    assert cells[0]["metadata"]["tags"] == ["skip-execution"]
    counts = [cell["execution_count"] for cell in cells[1:]]
    assert counts == [*range(1, len(cells))], "run from top to bottom"
    assert [one for cell in cells for one in cell["outputs"] if one["output_type"] == "error"] == []
    assert not re.search(r"/(tmp|work|home|root)/", json.dumps(cells))
    for text in code(path):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "reinforce":
                assert node.attr in reinforce.__all__


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, 4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    shown = json.dumps([cell.get("outputs", ()) for cell in notebook.cells])
    assert "text/html" in shown
