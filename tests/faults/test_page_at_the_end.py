"""Whatever ends a run, its page says so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.faults


@pytest.mark.parametrize(
    "fault, how",
    [
        ("sigint", "SIGINT: ended after step 2 of 6; its state is saved, --resume goes on from it."),
        ("sigterm", "SIGTERM: ended after step 2 of 6; its state is saved, --resume goes on from it."),
        ("raise", "RuntimeError: injected: the loss is broken"),
        ("nan", "5 optimiser steps in a row were skipped, the last in step 6"),
    ],
)
def test_the_page_says_how_a_run_ended_and_the_resumed_one_forgets_it(
    fault: str, how: str, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    ended = tiny("r", fault=fault, at=2)
    assert ended.status != 0, ended.output
    folder = tmp_path / "r"
    said = json.loads((folder / "ended.json").read_text())["how"]
    assert said.startswith(how)
    page = (folder / "report.html").read_text()
    assert "The run ended early." in page
    assert how in page
    if fault == "sigint":
        assert tiny("r", resume=True).status == 0
        assert not (folder / "ended.json").exists()
        assert "The run ended early." not in (folder / "report.html").read_text()


def test_a_run_that_is_killed_has_the_page_of_its_beginning(tiny: Callable[..., Any], tmp_path: Path) -> None:
    assert tiny("r", fault="kill", at=2).status == -9
    page = (tmp_path / "r" / "report.html").read_text()
    assert "The run goes on." in page
    assert "before the first step" in page
    assert "Where the numbers come from" in page
