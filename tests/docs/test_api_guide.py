"""docs/api.md is what the docstrings say."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import api_page as api_guide
import pytest

import llm_pg

ROOT = Path(__file__).resolve().parents[2]


def test_the_reference_is_made_from_the_docstrings() -> None:
    """Where this fails: python docs/generators/api_page.py docs/api.md"""
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == api_guide.markdown()


def test_every_name_of_the_package_is_in_the_reference() -> None:
    headings = set(re.findall(r"^### (\w+)$", api_guide.markdown(), flags=re.MULTILINE))
    assert set(llm_pg.__all__) - {"__version__", "Config"} <= headings


def test_the_parsed_parameters_are_those_of_the_imported_functions() -> None:
    seen = 0
    for modules in api_guide.ROOMS.values():
        for module, names in modules.items():
            for node in api_guide._definitions(module, names):
                found = getattr(importlib.import_module(module), node.name)
                if inspect.isfunction(found):
                    told = [re.split(r"[:=]", part)[0].strip().lstrip("*") for part in api_guide._parameters(node.args)]
                    assert [name for name in told if name] == list(inspect.signature(found).parameters)
                    assert inspect.getdoc(found), f"{module}.{node.name} has no docstring"
                    seen += 1
    assert seen > 40


def test_a_name_that_is_gone_is_an_error() -> None:
    with pytest.raises(ValueError, match="no_such_name"):
        api_guide._definitions("llm_pg.metrics", ("no_such_name",))


def test_the_reference_is_written_without_loading_torch() -> None:
    code = "import sys, api_page; api_page.markdown(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "docs" / "generators").returncode == 0
