"""The notebook is that of its source, small, and runs as on Colab.

`python -m tests.test_notebook` writes docs/quickstart.ipynb again from docs/quickstart.py.
"""

import os
import pathlib
import re

import pytest

jupytext = pytest.importorskip("jupytext", reason="needs the extra docs")
nbclient = pytest.importorskip("nbclient", reason="needs the extra docs")
nbformat = pytest.importorskip("nbformat", reason="needs the extra docs")
pytest.importorskip("ipykernel", reason="needs the extra docs")

SOURCE = pathlib.Path(__file__).parents[1] / "docs" / "quickstart.py"
NOTEBOOK = SOURCE.with_suffix(".ipynb")
MAX_BYTES = 300_000
# What a notebook finds on Colab, where these are set before any program starts.
COLAB = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "COLAB_RELEASE_TAG": "release"}
OF_THE_TESTS = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")  # see conftest.py


def execute(folder):
  """The notebook of SOURCE with its outputs, executed in `folder`."""
  notebook = jupytext.read(SOURCE)
  client = nbclient.NotebookClient(
    notebook, timeout=900, record_timing=False, resources={"metadata": {"path": str(folder)}}
  )
  kept = {name: value for name, value in os.environ.items() if name not in OF_THE_TESTS}
  return client.execute(env=kept | COLAB)


def list_outputs(notebook):
  return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def check_outputs(notebook):
  """Checks that every picture is there, and nothing else but lines on standard output."""
  outputs = list_outputs(notebook)
  pictures = [output for output in outputs if "image/png" in output.get("data", {})]
  assert len(pictures) == len(re.findall(r"^(?:plt\.)?show\(", SOURCE.read_text(), re.MULTILINE))
  assert all(output.name == "stdout" for output in outputs if output not in pictures)


def test_the_notebook_has_the_cells_of_its_source():
  cells = [
    [(cell.cell_type, cell.source) for cell in notebook.cells]
    for notebook in (jupytext.read(SOURCE), nbformat.read(NOTEBOOK, as_version=4))
  ]
  assert cells[0] == cells[1], "write it again: python -m tests.test_notebook"


def test_the_committed_notebook_is_small_and_has_its_pictures():
  assert NOTEBOOK.stat().st_size <= MAX_BYTES
  check_outputs(nbformat.read(NOTEBOOK, as_version=4))


def test_the_notebook_runs_as_on_colab(tmp_path):
  check_outputs(execute(tmp_path))


def write():
  """Writes NOTEBOOK, executed."""
  notebook = execute(SOURCE.parent)
  for number, cell in enumerate(notebook.cells):
    cell.id = f"cell-{number}"
  nbformat.validate(notebook)
  nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
  write()
