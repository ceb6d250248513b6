"""docs/api names what is public, and nothing that is gone; the site has every page."""

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

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


def public(name: str) -> Iterator[tuple[str, Any, str]]:
    """Name, signature's owner and docstring of an object, its public methods, or what a module defines."""
    try:
        module = import_module(name)
    except ModuleNotFoundError:
        path, _, last = name.rpartition(".")
        yield from described(last, getattr(import_module(path), last))
        return
    for last, found in vars(module).items():
        if not last.startswith("_") and getattr(found, "__module__", "") == name and callable(found):
            yield from described(last, found)


def described(name: str, found: Any) -> Iterator[tuple[str, Any, str]]:
    """The object, and the methods of its own that have a docstring."""
    if not inspect.isclass(found):
        if inspect.isfunction(found):
            yield name, found, inspect.getdoc(found) or ""
        return
    if "__init__" in vars(found) and not getattr(found, "_is_protocol", False):
        yield name, found, inspect.getdoc(found) or ""
    for last, method in vars(found).items():
        function = getattr(method, "__func__", method)
        if not last.startswith("_") and inspect.isfunction(function) and function.__doc__:
            yield f"{name}.{last}", function, inspect.getdoc(function) or ""


# Settings: each has its text beside it, which `llm-pg train --help-all` prints.
CONFIGS = {"ReinforceConfig", "RLOOConfig", "GRPOConfig", "ActorCriticConfig", "AlgorithmSpec"}


@pytest.mark.parametrize("name", [name for name in NAMED if name.rpartition(".")[2] not in CONFIGS])
def test_every_argument_of_what_is_public_has_a_line_of_its_own(name: str) -> None:
    missing = []
    for shown, owner, text in public(name):
        arguments = [word for word in inspect.signature(owner).parameters if word not in ("self", "cls")]
        missing += [
            f"{shown}: {word}"
            for word in arguments
            if word not in ("args", "kwargs")
            and not word.startswith("_")
            and not re.search(rf"^ +\*{{0,2}}{word}: ", text, flags=re.MULTILINE)
        ]
    assert not missing
