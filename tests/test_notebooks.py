"""The notebooks run from beginning to end."""

from pathlib import Path

import pytest

from tests.conftest import ONNX

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

# What takes long, and what does as well to see the code run: fewer epochs, instances and pixels.
SHORTER = {
    'f"paths.output_dir={folder}", ': 'f"paths.output_dir={folder}", "trainer.max_epochs=8", ',
    "max_epochs=12": "max_epochs=4",
    "images = torch.randn(8, 3, 64, 64)": "images = torch.randn(8, 3, 32, 32)",
    "torch.randn(32, 3, 64, 64), torch.randint(10, (32,))) for _ in range(4)": (
        "torch.randn(32, 3, 32, 32), torch.randint(10, (32,))) for _ in range(2)"
    ),
    "texts(2000)": "texts(200)",
}


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
    for long, short in SHORTER.items():
        assert sum(cell.source.count(long) for cell in whole.cells) == 1 or not ONNX, long
        for cell in whole.cells:
            cell.source = cell.source.replace(long, short)
    nbclient.NotebookClient(whole, timeout=300, resources={"metadata": {"path": NOTEBOOKS[0].parent}}).execute()
    for notebook in notebooks:
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(cell.execution_count for cell in cells)
        assert sum(len(cell.outputs) for cell in cells) >= 3
