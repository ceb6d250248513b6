"""Ranks of one run: two under torchrun, as the fault tests start them, or any number forked with all imports done."""

import json
from pathlib import Path

import pytest

from tests.faults.conftest import launch, ranks, two_ranks

__all__ = ["launch", "ranks", "two_ranks"]


@pytest.fixture
def demonstrations(tmp_path: Path) -> str:
    """A file for a warm start."""
    path = tmp_path / "demonstrations.jsonl"
    rows = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
