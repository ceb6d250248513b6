"""Held-out answers prompt by prompt: four kinds, an exact test, and what the page shows of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_pg.report import write_report
from llm_pg.report.pairs import pair, shortened

MakeRun = Callable[..., Path]


def answers(*passed: int, word: str = "") -> list[dict[str, Any]]:
    return [{"prompt": f"p{i}", "completion": f"{word}{i}", "passed": bool(ok)} for i, ok in enumerate(passed)]


def test_every_prompt_is_of_one_of_four_kinds() -> None:
    found = pair(answers(0, 1, 1, 0, 0), answers(1, 0, 1, 0, 1))
    assert found is not None
    assert found.counts == {"gained": 2, "lost": 1, "both": 1, "neither": 1}
    assert found.of_kind["lost"] == [("p1", "1", "1")]


@pytest.mark.parametrize("gained, lost, p", [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (9, 1, 22 / 1024), (3, 3, 1.0)])
def test_the_p_value_is_that_of_a_fair_coin_over_the_prompts_that_differ(gained: int, lost: int, p: float) -> None:
    """9 of 10 heads or more extreme: 2 (1 + 10) / 2^10."""
    first = answers(*[0] * gained, *[1] * lost, 1, 0)
    second = answers(*[1] * gained, *[0] * lost, 1, 0)
    found = pair(first, second)
    assert found is not None
    assert found.p_value == pytest.approx(p, abs=1e-15)


def test_prompts_are_paired_by_their_text_whatever_their_order_and_number() -> None:
    found = pair(answers(0, 1, 0), list(reversed(answers(1, 1))))
    assert found is not None
    assert found.counts == {"gained": 1, "lost": 0, "both": 1, "neither": 0}
    assert pair(answers(1), []) is None


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    text = shortened("begin" + "x" * 5_000 + "#### 42")
    assert text.startswith("begin")
    assert text.endswith("#### 42")
    assert len(text) < 700


def test_the_page_counts_the_kinds_of_a_run_and_compares_two_runs_on_their_prompts(make_run: MakeRun) -> None:
    first, second = make_run("first", 2), make_run("second", 2)
    for folder, after in ((first, answers(1, 1, 0, 0, word="was ")), (second, answers(1, 1, 1, 1, word="is <b>"))):
        before = json.loads((folder / "before.json").read_text())
        (folder / "before.json").write_text(json.dumps({**before, "examples": answers(0, 1, 0, 0)}))
        (folder / "after.json").write_text(json.dumps({"examples": after}))
    page = write_report([first, second]).read_text()
    assert "The same 4 prompts before and after: 1 gained, 0 lost, 1 right both times, 2 wrong both times" in page
    assert "3 gained, 0 lost, 1 right both times, 0 wrong both times" in page
    assert "2 right here alone, 0 in the first alone" in page
    assert "is &lt;b&gt;3" in page
