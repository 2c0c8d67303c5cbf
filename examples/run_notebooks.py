"""Run the notebooks and store what they print: `python examples/run_notebooks.py`.

Frames with whole pages, progress bars, times and widgets are left out of what is stored, so that a
notebook stays small and changes only when its numbers do.
"""

import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent / "notebooks"
_TIMEOUT = 1800  # seconds for a cell, and to start; a busy machine is slow


def execute(path: Path, folder: Path) -> Any:
    """Run a notebook in a folder, and return it with what is to be stored."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(
        notebook, timeout=_TIMEOUT, startup_timeout=_TIMEOUT, resources=resources
    ).execute()
    notebook.metadata.pop("language_info", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [one for one in map(_stored, cell.outputs) if one is not None]
    return notebook


def _stored(output: Any) -> Any:
    """Return what is stored of an output, or None."""
    if output.get("name") == "stderr":
        return None
    data = output.get("data", {})
    if "application/vnd.jupyter.widget-view+json" in data:
        return None
    if "<iframe" in data.get("text/html", ""):
        del data["text/html"]
    return output


if __name__ == "__main__":
    for file in sorted(NOTEBOOKS.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as made:
            nbformat.write(execute(file, Path(made)), file)
