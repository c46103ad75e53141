"""The notebooks run from beginning to end."""

from pathlib import Path

import pytest

from tests.conftest import ONNX

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["paper", "quickstart", "torchvision_onnx", "transformers_onnx"]


@pytest.mark.slow
def test_they_run_one_after_another():
    """In one kernel, which imports once and forgets all names after each."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    # Earlier exporters fail on batch norms.
    notebooks = [nbformat.read(path, as_version=4) for path in NOTEBOOKS if ONNX or "onnx" not in path.stem]
    whole = nbformat.v4.new_notebook()
    for number, notebook in enumerate(notebooks):
        whole.cells += [*notebook.cells, nbformat.v4.new_code_cell("%reset -f")]
        for cell in notebook.cells:
            cell.id = f"{number}-{cell.id}"
    nbclient.NotebookClient(whole, timeout=300, resources={"metadata": {"path": NOTEBOOKS[0].parent}}).execute()
    for notebook in notebooks:
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(cell.execution_count for cell in cells)
        assert sum(len(cell.outputs) for cell in cells) >= 3
