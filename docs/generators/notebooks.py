"""Runs the notebooks and stores what their cells show, so that they can be read without running them:

python docs/generators/notebooks.py [NAME ...]        # docs/notebooks/NAME.ipynb; without names all
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbclient
import nbformat

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "notebooks"


def execute(path: Path, folder: Path) -> Any:
    """The notebook as it is after all of its cells have run in an empty folder, offline, from this checkout."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "COLUMNS": "100"}
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=280, kernel_name="python3", resources=resources).execute()
    return notebook


def readable(notebook: Any) -> Any:
    """Without what depends on the machine: progress bars, warnings, timings of cells and the folder's name."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = joined([out for out in cell.outputs if out.get("name") != "stderr"])
            for output in cell.outputs:
                output.get("metadata", {}).clear()
                if "image/png" in output.get("data", {}):
                    output.data.pop("text/plain", None)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def joined(outputs: list[Any]) -> list[Any]:
    """With what was printed piece by piece in one piece."""
    out: list[Any] = []
    for output in outputs:
        if out and output.output_type == out[-1].output_type == "stream":
            out[-1].text += output.text
        else:
            out.append(output)
    return out


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.ipynb")):
        if path.stem in sys.argv[1:] or len(sys.argv) == 1:
            with tempfile.TemporaryDirectory() as folder:
                nbformat.write(readable(execute(path, Path(folder))), path)
                print(path, f"{path.stat().st_size / 1000:.0f} kB")
