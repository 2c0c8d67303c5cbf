"""The notebooks of `examples/notebooks`: they run, and what is stored in them is theirs."""

import nbformat
import pytest
from run_notebooks import NOTEBOOKS, execute

FILES = sorted(NOTEBOOKS.glob("*.ipynb"))


def kinds(notebook) -> list[list[set[str]]]:
    """Return what kinds of data each cell shows."""
    return [
        [set(one.get("data", {"text/plain": ""})) for one in cell.get("outputs", [])]
        for cell in notebook.cells
    ]


def test_what_is_stored_is_small_and_names_no_machine():
    assert len(FILES) == 2
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        assert len(text) < 200_000
        for word in ("<iframe", "/home/", "/root/", "/tmp/", "Traceback", "stderr"):
            assert word not in text


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_runs_and_shows_what_is_stored(file, tmp_path):
    made = execute(file, tmp_path)
    assert any("text/html" in shown for cell in kinds(made) for shown in cell)
    assert kinds(made) == kinds(nbformat.read(file, as_version=4))
