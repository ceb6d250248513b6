"""The notebooks run from the first cell to the last, offline, in a folder of their own, and store what they show."""

import re
from pathlib import Path

import nbformat
import notebooks
import pytest

NOTEBOOKS = sorted(notebooks.FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_offline_and_shows_what_is_stored(path: Path, tmp_path: Path) -> None:
    """Where only what is shown differs: python docs/generators/notebooks.py"""
    stored = nbformat.read(path, as_version=4)
    made = notebooks.readable(notebooks.execute(path, tmp_path))
    code = [cell for cell in made.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell, kept in zip(made.cells, stored.cells, strict=True):
        shown = [sorted(out.get("data", {"text": ""})) for out in cell.get("outputs", [])]
        assert shown == [sorted(out.get("data", {"text": ""})) for out in kept.get("outputs", [])], cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_names_no_folder_of_a_machine_and_no_error(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|Users|work)/", text)
    assert '"output_type": "error"' not in text


def test_grpo_from_nothing_has_thirty_cells() -> None:
    (path,) = [path for path in NOTEBOOKS if path.stem == "grpo_from_nothing"]
    assert len(nbformat.read(path, as_version=4).cells) == 30
