"""Every notebook runs, and says the same as its paired source."""

import pathlib

import jupytext
import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))

# What each notebook prints, among other things.
PRINTED = {
    "01_quickstart": ("bits per byte on held-out text", "def "),
    "02_match3": (
        "2-simplicial: 39,169 parameters, 0.",
        "dense: 39,169 parameters, 0.",
    ),
    "03_selective_memory": (
        "512 tokens, seed 0: validation loss",
        "1024 tokens, seed 1: validation loss",
    ),
}


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_all_notebooks_are_expected_to_print_something():
    assert [source.stem for source in SOURCES] == list(PRINTED)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebook_and_source_are_in_step(source):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert cells(notebook) == cells(jupytext.read(source)), (
        f"run: jupytext --sync {source.name}"
    )


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebook_runs(source, tmp_path, monkeypatch):
    # Notebooks compute as much as they compile: there it pays to let XLA optimize.
    monkeypatch.delenv("XLA_FLAGS")
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": tmp_path}},
    )
    client.execute()
    text = "".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stdout"
    )
    for part in PRINTED[source.stem]:
        assert part in text
