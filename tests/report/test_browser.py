"""The page in a real browser: it loads nothing, complains of nothing, filters, colours, and keeps hostile text text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from report_browser import Browser, needs_browser
from report_rows import token_row

from llm_pg.report import write_report

pytestmark = needs_browser
RIGHT, DOWN = "\ue014", "\ue015"
HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    "<img src=x onerror='window.hacked=3'>",
    "<!--<script>",
    "\x00\x07\x1b[31m\x7f control",
    "\u202eright to left\u202c \u2066isolated",
    "\ud800 half a pair",
    "line\u2028separator",
    "{{ 7 * 7 }} {% raw %}",
]


@pytest.fixture
def page(browser: Browser, make_run: Any) -> Browser:
    browser.size(1280, 900)
    browser.dark(False)
    browser.open(write_report([make_run()]))
    return browser


def texts(browser: Browser, selector: str) -> list[str]:
    found = browser.js("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)
    return list(found)


def choose(browser: Browser, name: str, value: str) -> None:
    script = """
        const e = document.getElementById(arguments[0]);
        e.value = arguments[1];
        e.dispatchEvent(new Event(e.id === 'mode' ? 'change' : 'input', {bubbles: true}));
    """
    browser.js(script, name, value)


def test_the_page_asks_for_nothing_and_the_console_is_silent(browser: Browser, make_run: Any) -> None:
    path = write_report([make_run()])
    browser.log("browser")
    browser.requests()
    browser.open(path)
    assert browser.requests() == [path.as_uri()]
    assert browser.log("browser") == []


def test_a_planted_error_reaches_the_console_that_the_test_above_reads(browser: Browser, page: Browser) -> None:
    browser.log("browser")
    browser.js("document.body.append(Object.assign(document.createElement('script'), {textContent: '1'}))")
    assert any("Content Security Policy" in entry["message"] for entry in browser.log("browser"))


def test_filters_count_what_they_leave(page: Browser) -> None:
    assert texts(page, "#count") == ["240 completions"]
    choose(page, "step", "7")
    assert texts(page, "#count") == ["4 completions"]
    choose(page, "prompt", "1")
    assert texts(page, "#count") == ["2 completions"]
    choose(page, "low", "0.5")
    assert texts(page, "#count") == ["1 completion"]
    choose(page, "part", "1")  # "form", which no completion of this run has over 0.25
    assert texts(page, "#count") == ["0 completions"]
    choose(page, "search", "not there")
    assert texts(page, "#count") == ["0 completions"]
    page.js("document.querySelector('button[type=reset]').click()")
    page.js("return new Promise(r => setTimeout(r, 50))")
    assert texts(page, "#count") == ["240 completions"]


def test_truncated_and_unscorable_ones_are_found(browser: Browser, make_run: Any) -> None:
    from report_rows import token_row

    def rows(step: int) -> list[dict[str, Any]]:
        cut = token_row(step, 0, 0, ["cut"], truncated=True)
        lost = token_row(step, 0, 1, ["lost"], reward=None, parts={"right": None})
        return [cut, lost, token_row(step, 0, 2, ["good"])]

    browser.open(write_report([make_run(steps=3, rows=rows)]))
    choose(browser, "kind", "truncated")
    assert texts(browser, "#list .clip:not(.of-prompt)") == ["cut"] * 3
    choose(browser, "kind", "unscorable")
    assert texts(browser, "#list .clip:not(.of-prompt)") == ["lost"] * 3
    choose(browser, "kind", "scored")
    choose(browser, "sort", "first")
    assert texts(browser, "#list .row .quiet")[0] == "step 1"


def test_pointing_at_a_token_reads_its_numbers(page: Browser) -> None:
    page.hover(".tok", 1)
    (said,) = texts(page, "#numbers")
    assert "token 2 of 3" in said
    assert "“ b”" in said
    assert "advantage 1," in said
    assert "log-prob -0.6" in said
    assert "KL 0.25" in said
    assert "probability 0.549" in said  # exp(-0.6)


def test_arrow_keys_walk_the_tokens(page: Browser) -> None:
    page.js("document.querySelector('.tok').focus()")
    page.press(RIGHT)
    page.press(RIGHT)
    assert page.js("return document.activeElement.dataset.i") == "2"
    assert "token 3 of 3" in texts(page, "#numbers")[0]


@pytest.mark.parametrize("width, height", [(1280, 900), (390, 844)])
@pytest.mark.parametrize("place", [0, 300, 518])
def test_a_token_s_numbers_are_beside_it_in_the_window_by_pointer_touch_and_keyboard(
    browser: Browser, make_run: Any, width: int, height: int, place: int
) -> None:
    """Of a completion of 519 tokens; the numbers had been below all of them."""
    browser.size(width, height)
    long = [f" word{i}" for i in range(519)]
    browser.open(write_report([make_run("long", 1, lambda step: [token_row(step, 0, 0, long)])]))
    where = """
        const token = document.querySelectorAll('.tok')[arguments[0]].getClientRects()[0];
        const tip = document.getElementById('numbers').getBoundingClientRect();
        const across = Math.max(tip.left - token.right, token.left - tip.right);
        const apart = Math.max(tip.top - token.bottom, token.top - tip.bottom, across);
        return [apart, tip.top >= 0, tip.bottom <= innerHeight, tip.left >= 0, tip.right <= innerWidth];
    """
    touch = "document.querySelectorAll('.tok')[arguments[0]].click()"
    keys = "const t = document.querySelectorAll('.tok')[arguments[0]]; t.tabIndex = 0; t.focus()"
    for reach in ("pointer", touch, keys):
        browser.hover(".tok", place) if reach == "pointer" else browser.js(reach, place)
        assert f"token {place + 1} of 519" in texts(browser, "#numbers")[0]
        apart, *inside = browser.js(where, place)
        assert 0 <= apart <= 8
        assert inside == [True] * 4
    browser.press("\ue00c")  # Escape
    assert browser.js("return document.getElementById('numbers').hidden")


def test_the_row_s_columns_are_beside_its_completion_the_expected_answer_first(page: Browser) -> None:
    assert texts(page, "#columns dt") == ["answer", "hint"]
    assert texts(page, "#columns dd") == ["right 0", "of 0"]


def test_arrow_keys_walk_the_list_and_enter_opens(page: Browser) -> None:
    page.js("document.querySelector('#list button').focus()")
    page.press(DOWN)
    page.press("\ue007")
    assert page.js("return document.activeElement === document.querySelectorAll('#list button')[1]")
    assert page.js("return document.querySelectorAll('#list button')[1].getAttribute('aria-current')") == "true"


def alphas(browser: Browser) -> list[float]:
    colours = browser.js("return [...document.querySelectorAll('.tok')].map(e => e.style.backgroundColor)")
    return [float(re.findall(r"[\d.]+", c)[3]) if len(re.findall(r"[\d.]+", c)) > 3 else 1.0 for c in colours]


def test_another_colouring_colours_by_other_numbers(page: Browser) -> None:
    by_weight = alphas(page)
    assert by_weight[0] < by_weight[1] < by_weight[2]
    choose(page, "mode", "k")
    by_kl = alphas(page)
    assert by_kl[0] == by_kl[1] == by_kl[2] > 0


def test_tokens_with_a_negative_weight_are_underlined_too(page: Browser) -> None:
    choose(page, "sort", "low")
    page.js("document.querySelector('#list button').click()")
    assert page.js("return [...document.querySelectorAll('.tok')].every(e => e.classList.contains('neg'))")


def test_curves_are_read_by_keys(page: Browser) -> None:
    page.js("[...document.querySelectorAll('.chart')].find(e => e.ariaLabel.startsWith('Reward.')).focus()")
    page.press("\ue011")  # Home
    said = [text for text in texts(page, ".reading") if text.strip()]
    assert said == ["step 1: reward 0.21"]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_completions_stay_text(browser: Browser, make_run: Any, text: str) -> None:
    from report_rows import token_row

    def rows(step: int) -> list[dict[str, Any]]:
        whole = token_row(step, 0, 0, [text], prompt=text)
        return [whole, {k: v for k, v in whole.items() if k != "pieces"} | {"completion": text, "parts": {text: 1.0}}]

    browser.open(write_report([make_run(steps=2, rows=rows)]))
    assert browser.js("return window.hacked === undefined && document.querySelectorAll('img').length === 0")
    assert browser.js("return document.scripts.length") == 2
    shown = texts(browser, "#list .clip:not(.of-prompt)")
    assert len(shown) == 4
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u2028\u202a-\u202e\u2066-\u2069]", "".join(shown))
    if text.isascii() and text.isprintable():
        assert shown == [text] * 4


def test_a_completion_of_a_million_characters_is_cut_with_its_length_said(browser: Browser, make_run: Any) -> None:
    from report_rows import token_row

    def rows(step: int) -> list[dict[str, Any]]:
        return [token_row(step, 0, 0, ["x" * 1_000_000])]

    page = write_report([make_run(steps=1, rows=rows)])
    assert page.stat().st_size < 500_000
    browser.open(page)
    assert "1000000 characters in all" in texts(browser, "#detail")[0]


def test_ten_thousand_completions_of_a_thousand_steps_open_in_a_second_of_the_browser_s_work(
    browser: Browser, make_run: Any
) -> None:
    """The work of its main thread until the page is there, not the time of the wall: tests share their cores."""

    def rows(step: int) -> list[dict[str, Any]]:
        return [token_row(step, k // 5, k % 5, [f"w{step}", f" x{k}", "</s>"]) for k in range(10)]

    path = write_report([make_run(steps=1000, rows=rows)])
    assert path.stat().st_size < 3_000_000
    browser.size(1280, 900)
    browser.devtools("Performance.enable", {"timeDomain": "threadTicks"})
    before = {m["name"]: m["value"] for m in browser.devtools("Performance.getMetrics", {})["metrics"]}
    browser.open(path)
    after = {m["name"]: m["value"] for m in browser.devtools("Performance.getMetrics", {})["metrics"]}
    browser.devtools("Performance.disable", {})
    assert texts(browser, "#count") == [f"{len(browser.js('return JSON.parse(data.textContent).rows'))} completions"]
    assert browser.js("return JSON.parse(data.textContent).rows.length") >= 9_000
    spent = {name: after[name] - before.get(name, 0.0) for name in ("TaskDuration", "ScriptDuration", "LayoutDuration")}
    assert 0 < spent["TaskDuration"] < 1.0, spent


@pytest.mark.parametrize("width, height, dark", [(1280, 900, False), (390, 844, False), (1280, 900, True)])
def test_nothing_is_wider_than_the_screen(
    browser: Browser, make_run: Any, tmp_path: Path, width: int, height: int, dark: bool
) -> None:
    browser.size(width, height)
    browser.dark(dark)
    browser.open(write_report([make_run(), make_run("second", algorithm="rloo")]))
    assert browser.js("return document.documentElement.scrollWidth") <= width
    light = browser.js("return getComputedStyle(document.body).backgroundColor") == "rgb(251, 251, 250)"
    assert light is not dark
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_every_control_has_a_name_and_every_drawing_a_sentence(page: Browser) -> None:
    nameless = """
        const named = e => e.textContent.trim() || e.ariaLabel || (e.labels && e.labels.length);
        return [...document.querySelectorAll('button, select, input, [role=img], [role=region]')]
            .filter(e => !named(e)).map(e => e.outerHTML.slice(0, 80));
    """
    assert page.js(nameless) == []
    assert page.js("return [...document.querySelectorAll('.chart')].every(e => /step 60/.test(e.ariaLabel))")
