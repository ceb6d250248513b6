"""docs/api names what is public, and nothing that is gone; the site has every page."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import llm_pg

ROOT = Path(__file__).resolve().parents[2]
NAMED = [
    name
    for page in sorted((ROOT / "docs" / "api").glob("*.md"))
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
]


@pytest.mark.parametrize("name", NAMED)
def test_what_the_api_pages_name_exists_and_has_a_docstring(name: str) -> None:
    try:
        found = import_module(name)
    except ModuleNotFoundError:
        module, _, last = name.rpartition(".")
        found = getattr(import_module(module), last)
    assert found.__doc__


def test_every_name_of_the_package_is_on_an_api_page() -> None:
    assert set(llm_pg.__all__) - {"__version__", "Config"} <= {name.rpartition(".")[2] for name in NAMED}


def test_the_site_s_navigation_has_every_page_of_docs_and_no_other() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- [^\n]*?: ([\w./-]+\.md)$", text, flags=re.MULTILINE)
    assert yaml.safe_load(text)["nav"], "the file is valid YAML"
    docs = ROOT / "docs"
    pages = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    notebooks = {f"notebooks/{path.stem}.md" for path in (docs / "notebooks").glob("*.ipynb")}
    brought = {"results.md", "security.md", "contributing.md", "changelog.md"}  # docs/generators/site.py
    assert sorted(listed) == sorted(pages | notebooks | brought)
