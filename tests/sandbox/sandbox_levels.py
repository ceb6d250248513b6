"""The levels of protection that this kernel gives, for parametrised tests."""

import pytest
from escape_attempts import levels

from llm_pg import sandbox

LEVELS = ("namespaces", "Landlock", "first Landlock")


def level_or_skip(name: str) -> sandbox.Level:
    """A level by name; a skip that names what is missing where the kernel does not give it."""
    found = levels()[name]
    if not found.contained or (name == "namespaces" and not found.namespaces):
        pytest.skip(f"the level {name!r} is not to be had here: {found.reason}")
    return found
