"""The controls of the curves, in a real browser: axis, smoothing, log scale, lines to switch, files to take away."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from report_browser import Browser, needs_browser

from llm_pg.report import write_report

pytestmark = needs_browser
REWARD = "[...document.querySelectorAll('figure')].find(f => f.textContent.includes('Reward by part'))"


@pytest.fixture
def page(browser: Browser, make_run: Any) -> Browser:
    browser.size(1280, 900)
    browser.open(write_report([make_run()]))
    browser.log("browser")
    browser.requests()
    return browser


def control(page: Browser, name: str, value: Any) -> None:
    page.js(
        "const e = document.getElementById('curve-' + arguments[0]);"
        "if (typeof arguments[1] === 'boolean') e.checked = arguments[1]; else e.value = arguments[1];"
        "e.dispatchEvent(new Event('input', {bubbles: true}))",
        name,
        value,
    )


def of_figure(page: Browser, script: str) -> Any:
    return page.js(f"const f = {REWARD}; {script}")


def test_the_axis_of_seconds_ends_at_the_seconds_of_all_steps_and_back_at_their_number(page: Browser) -> None:
    read = "const s = f.querySelector('svg'); s.focus(); return f.querySelector('.reading').textContent"
    for name, end in (("seconds", "seconds 90:"), ("step", "step 60:")):  # 60 steps of 1.5 s
        control(page, "x", name)
        of_figure(page, "f.querySelector('svg').focus()")
        page.press("\ue010")  # End
        assert of_figure(page, read).startswith(end)
        assert of_figure(page, "return f.querySelector('.axis').textContent") == end.split()[0]


def test_a_line_can_be_switched_off_and_on_but_never_the_last_one(page: Browser) -> None:
    lines = "return f.querySelectorAll('.line:not(.raw)').length"
    states = "return [...f.querySelectorAll('.switch')].map(b => b.getAttribute('aria-pressed'))"
    assert of_figure(page, lines) == 2
    of_figure(page, "f.querySelectorAll('.switch')[0].click()")
    assert (of_figure(page, lines), of_figure(page, states)) == (1, ["false", "true"])
    of_figure(page, "f.querySelectorAll('.switch')[1].click()")
    assert of_figure(page, lines) == 1
    of_figure(page, "f.querySelectorAll('.switch')[0].click()")
    assert (of_figure(page, lines), of_figure(page, states)) == (2, ["true", "true"])


def test_a_log_scale_puts_equal_ratios_at_equal_distances(page: Browser) -> None:
    """The parts of the reward are 0.5 and 0.25 at every step; the grid has powers of ten."""
    heights = "return [...f.querySelectorAll('.line:not(.raw)')].map(p => +p.getAttribute('d').match(/ ([\\d.]+)/)[1])"
    control(page, "log", True)
    assert "log scale" in of_figure(page, "return f.querySelectorAll('.axis')[1].textContent")
    first, second = of_figure(page, heights)
    assert abs(first - second) > 50
    control(page, "log", False)
    assert "log scale" not in of_figure(page, "return f.querySelectorAll('.axis')[1].textContent")


def test_smoothing_calms_a_curve_and_none_leaves_it_as_it_was_measured(browser: Browser, make_run: Any) -> None:
    path = make_run()
    lines = (path / "metrics.jsonl").read_text().splitlines()
    noisy = [line.replace('"kl": 0.0', f'"kl": {i % 2}.0') for i, line in enumerate(lines)]
    (path / "metrics.jsonl").write_text("\n".join(noisy) + "\n")
    browser.open(write_report([path]))
    figure = "[...document.querySelectorAll('figure')].find(f => f.textContent.includes('KL to the reference'))"
    spread = (
        f"const d = {figure}.querySelector('.line:not(.raw)').getAttribute('d');"
        "const y = d.slice(1).split('L').map(p => +p.split(' ')[1]); return Math.max(...y) - Math.min(...y)"
    )
    heights = {}
    for name in ("none", "light", "strong"):
        control(browser, "smooth", name)
        heights[name] = browser.js(spread)
    assert heights["none"] > 2 * heights["light"] > 2 * heights["strong"]


def test_a_curve_can_be_taken_away_as_numbers_and_as_a_picture(page: Browser) -> None:
    page.js("HTMLAnchorElement.prototype.click = function () { window.saved = [this.download, this.href]; }")
    of_figure(page, "f.querySelectorAll('.save')[0].click()")
    name, address = page.js("return window.saved")
    assert name == "Reward by part.csv"
    rows = unquote(address.partition(",")[2]).splitlines()
    assert rows[0] == 'series,step,step,"Reward by part"'
    assert rows[1] == '"form",1,1,0.25'
    assert len(rows) == 1 + 2 * 60
    page.js("window.saved = null")
    of_figure(page, "f.querySelectorAll('.save')[1].click()")
    for _ in range(100):
        if (saved := page.js("return window.saved")) is not None:
            break
    assert saved[0] == "Reward by part.png"
    assert base64.b64decode(saved[1].partition(",")[2])[:8] == b"\x89PNG\r\n\x1a\n"
    assert [entry for entry in page.log("browser") if entry["level"] == "SEVERE"] == []
    assert [address for address in page.requests() if not address.startswith(("data:", "file:"))] == []


def chart_named(page: Browser, title: str) -> str:
    """A selector of the chart with this title."""
    script = """
        const named = f => f.querySelector('strong').textContent === arguments[0];
        [...document.querySelectorAll('figure')].find(named).id = 'wanted'"""
    page.js(script, title)
    return "#wanted svg"


def steps_shown(page: Browser, selector: str) -> list[float]:
    """First and last step that the keys reach in a chart."""
    page.js("document.querySelector(arguments[0]).focus({preventScroll: true})", selector)
    found = []
    for key in ("\ue011", "\ue010"):  # Home, End
        page.press(key)
        said = page.js("return document.querySelector('#wanted .reading').textContent")
        found.append(float(said.split()[1].rstrip(":")))
    return found


@pytest.mark.parametrize("kind", ["mouse", "touch"])
def test_a_drag_across_a_curve_shows_that_part_and_a_double_click_or_the_button_all_of_it(
    page: Browser, kind: str
) -> None:
    """The drawing's middle half holds the steps from a little under 15 to a little over 45 of 60."""
    chart = chart_named(page, "Entropy")
    page.drag(chart, 0.3, 0.75, kind)
    low, high = steps_shown(page, chart)
    assert 10 <= low <= 15
    assert 40 <= high <= 46
    numbers = page.js("return [...document.querySelectorAll('#wanted svg text:not(.axis)')].map(t => t.textContent)")
    assert "60" not in numbers
    if kind == "mouse":
        page.double_click(chart)
    else:
        page.js("document.querySelector('#wanted .whole').click()")
    assert steps_shown(page, chart) == [1, 60]
    assert page.js("return document.querySelector('#wanted .whole').hidden")


def test_keys_show_a_part_around_the_cursor_and_all_of_it_again(page: Browser) -> None:
    chart = chart_named(page, "Entropy")
    assert steps_shown(page, chart) == [1, 60]
    page.press("+")  # the cursor is at step 60
    low, high = steps_shown(page, chart)
    assert (high, 60 - low) == (60, pytest.approx(29, abs=1))
    page.press("+")
    assert steps_shown(page, chart)[0] > 40
    page.press("-")
    assert steps_shown(page, chart)[0] == low
    page.press("0")
    assert steps_shown(page, chart) == [1, 60]


def test_a_part_is_left_where_the_axis_counts_something_else_and_a_click_is_no_drag(page: Browser) -> None:
    chart = chart_named(page, "Entropy")
    page.drag(chart, 0.5, 0.505)
    assert steps_shown(page, chart) == [1, 60]
    page.drag(chart, 0.3, 0.75)
    control(page, "x", "seconds")
    assert steps_shown(page, chart) == [1.5, 90]
    control(page, "x", "step")


def test_a_part_of_a_thousand_steps_has_the_numbers_of_its_steps(browser: Browser, make_run: Any) -> None:
    """Not the means over several, of which the whole curve is drawn."""
    page = write_report([make_run(steps=1000)])
    assert page.stat().st_size < 3_000_000
    browser.open(page)
    chart = chart_named(browser, "Entropy")
    for _ in range(7):
        browser.js("document.querySelector(arguments[0]).focus()", chart)
        browser.press("+")
    assert steps_shown(browser, chart) == [993, 1000]


def test_curves_are_under_outcome_health_and_speed(page: Browser) -> None:
    titles = page.js("return [...document.querySelectorAll('#curves h3')].map(h => h.textContent)")
    assert titles[:3] == ["Outcome", "Health", "Speed"]


def test_both_axes_of_every_chart_have_titles_without_a_script_too(make_run: Any) -> None:
    text = Path(write_report([make_run()])).read_text()
    assert text.count('class="axis"') == 2 * text.count('class="chart"') > 20
