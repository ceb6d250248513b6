"""Several runs on one page: the same prompt, with what each of them answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report_browser import Browser, needs_browser
from report_rows import token_row

from llm_pg.report import write_report
from llm_pg.report.pairs import side_by_side

MakeRun = Callable[..., Path]


def example(prompt: str, completion: str, passed: bool, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "passed": passed, **more}


def test_prompts_are_in_three_kinds_and_those_on_which_runs_differ_come_first() -> None:
    first = [
        example("p", "a", True),
        example("q", "b", False),
        example("r", "c", True),
        example("only here", "d", True),
    ]
    second = [example("r", "f", False), example("q", "e", False), example("p", "g", True)]
    found = side_by_side([first, second, second])
    assert [(kind.title, kind.number) for kind in found] == [
        ("right in some and wrong in others", 1),
        ("right in all", 1),
        ("wrong in all", 1),
    ]
    assert found[0].some == [("r", [("c", True), ("f", False), ("f", False)])]
    assert side_by_side([first]) == side_by_side([first, []]) == []


def test_a_conversation_is_shown_without_the_marks_of_its_template(make_run: MakeRun) -> None:
    marked = "<|im_start|>user\nsort ba<|im_end|>\n<|im_start|>assistant\n"
    said = [{"role": "user", "content": "sort ba"}]
    with_system = [{"role": "system", "content": "Be brief."}, *said]

    def rows(step: int) -> list[dict[str, Any]]:
        return [token_row(step, 0, k, ["ab"], prompt=marked, messages=m) for k, m in ((0, said), (1, with_system))]

    folders = [make_run(name, 1, rows) for name in ("one", "two")]
    for folder in folders:
        answers = {"examples": [example(marked, "ab", True, messages=said)]}
        (folder / "after.json").write_text(json.dumps(answers))
        before = json.loads((folder / "before.json").read_text())
        (folder / "before.json").write_text(json.dumps({**before, **answers}))
    text = write_report(folders).read_text()
    assert "im_start" not in text
    assert '"prompts":["sort ba","system: Be brief.\\nuser: sort ba"]' in text
    assert text.count('<td class="text">sort ba</td>') == 3  # of each run before and after, and of both side by side


@needs_browser
def test_the_other_run_s_completions_of_a_prompt_are_below_and_open_by_a_click(
    browser: Browser, make_run: MakeRun
) -> None:
    def rows_of(word: str, **changes: Any) -> Callable[[int], list[dict[str, Any]]]:
        return lambda step: [token_row(step, 0, k, [f"{word} {step} {k}"], **changes) for k in (0, 1)]

    runs = [make_run("first", 4, rows_of("one")), make_run("second", 3, rows_of("two"))]
    browser.open(write_report([*runs, make_run("third", 3, rows_of("three", prompt="another prompt"))]))
    heads = "return [...document.querySelectorAll('.elsewhere h4')].map(e => e.textContent.trim())"
    assert browser.js(heads) == ["second, step 3"]  # the nearest to step 4; the third has no such prompt
    texts = browser.js("return [...document.querySelectorAll('.elsewhere .text')].map(e => e.textContent)")
    assert texts == ["two 3 0", "two 3 1"]
    browser.js("document.querySelector('.elsewhere .open').click()")
    assert browser.js("return document.querySelector('#run').value") == "1"
    assert browser.js("return document.querySelector('.tokens').textContent") == "two 3 0"
    assert browser.js(heads) == ["first, step 3"]
