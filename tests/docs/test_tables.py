"""The computed tables of README and docs are what is computed."""

import pytest
import tables


@pytest.mark.parametrize("page, name", list(tables.BLOCKS), ids=lambda word: word)
def test_a_computed_table_is_what_is_computed(page: str, name: str) -> None:
    """Where this fails: python docs/generators/tables.py"""
    assert tables.written(page, name) == tables.BLOCKS[page, name]().strip()
