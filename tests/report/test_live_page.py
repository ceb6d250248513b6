"""The page of a run that goes on says so and loads itself again; the last page does not."""

from __future__ import annotations

import json
import re
import time as clock
from collections.abc import Callable
from pathlib import Path

import pytest
from report_browser import Browser, needs_browser

from llm_pg.doctor.evidence import ENDED, read_run
from llm_pg.report import LivePage, write_report
from llm_pg.report.live import page_from_begin_to_end
from llm_pg.report.page import Live
from llm_pg.time_budget import TimeBudget

MakeRun = Callable[..., Path]


class Time:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_the_page_of_a_live_run_reloads_and_the_last_one_does_not(make_run: MakeRun) -> None:
    run = make_run(steps=3)
    time = Time()
    live = LivePage(run, pytest.fail, seconds=20.0, budget=TimeBudget(20.0, now=time))
    time.seconds = 100.0
    assert live.refresh(3)
    text = (run / "report.html").read_text()
    assert "The run goes on." in text
    assert "after step 3" in text
    assert '<meta http-equiv="refresh" content="20">' in text
    assert 'data-seconds="20.0"' in text
    last = write_report([run]).read_text()
    assert "The run goes on." not in last
    assert 'http-equiv="refresh"' not in last


def test_the_page_is_written_again_after_the_seconds_given_and_never_with_0(make_run: MakeRun) -> None:
    run, time = make_run(steps=1), Time()
    live = LivePage(run, pytest.fail, seconds=60.0, budget=TimeBudget(60.0, now=time))
    written = []
    for second in range(1, 301):
        time.seconds = float(second)
        if live.refresh(1):
            written.append(second)
    assert written == [60, 120, 180, 240, 300]
    never = LivePage(run, pytest.fail, seconds=0, budget=TimeBudget(0, now=time))
    assert not never.refresh(1)


def test_a_page_that_cannot_be_written_is_one_warning(make_run: MakeRun) -> None:
    run, time = make_run(steps=1), Time()
    (run / "report.html").unlink(missing_ok=True)
    (run / "report.html").mkdir()
    said: list[str] = []
    live = LivePage(run, said.append, seconds=10.0, budget=TimeBudget(10.0, now=time))
    for second in range(100, 400, 50):
        time.seconds = float(second)
        assert not live.refresh(1)
    assert len(said) == 1
    assert "cannot be written while the run goes on" in said[0]


def test_a_page_is_there_when_a_run_begins_with_its_settings_and_where_it_was_started(make_run: MakeRun) -> None:
    run = make_run(steps=1, learning_rate=1e-3)
    for name in ("metrics.jsonl", "summary.json", "before.json", "completions/step-000001.jsonl"):
        (run / name).unlink()
    (run / "sessions.jsonl").write_text(json.dumps({"began": "2026-01-02T03:04:05+00:00", "host": "a-host"}) + "\n")
    with page_from_begin_to_end(run, pytest.fail, seconds=20.0):
        text = (run / "report.html").read_text()
    assert "Waiting for the first step." in text
    assert "a-host" in text
    assert "<td><bdi>0.001</bdi></td>" in text
    assert 'class="chart"' not in text
    assert "Where the time goes" not in text
    assert not (run / ENDED).exists()


@pytest.mark.parametrize("seconds", [0.0, 20.0])
@pytest.mark.parametrize(
    "error, how",
    [
        (KeyboardInterrupt(), "Interrupted from the keyboard."),
        (SystemExit("told to end"), "told to end"),
        (ValueError("a <b> with my-secret"), "ValueError: a <b> with [hidden]"),
    ],
)
def test_an_early_end_is_on_the_page_whatever_it_was(
    make_run: MakeRun, error: BaseException, how: str, seconds: float
) -> None:
    run = make_run(steps=2)
    (run / "summary.json").unlink()
    clean = lambda text: text.replace("my-secret", "[hidden]")  # noqa: E731
    with pytest.raises(type(error)), page_from_begin_to_end(run, pytest.fail, clean, seconds=seconds):
        raise error
    text = (run / "report.html").read_text()
    assert read_run(run).ended["how"] == how
    assert "The run ended early." in text
    assert how.replace("<", "&lt;").replace(">", "&gt;") in text
    assert "The run goes on." not in text
    with page_from_begin_to_end(run, pytest.fail, seconds=seconds):  # it is resumed
        assert read_run(run).ended == {}


@needs_browser
@pytest.mark.parametrize(
    "age, said",
    [
        (0.0, r"written (just now|[12] seconds? ago), after step 7\.$"),
        (43.0, r"written 4[3-5] seconds ago, after step 7\.$"),
        (600.0, r"written 10 minutes ago, after step 7\. No newer one has come"),
        (3 * 86400.0, r"written 3 days ago, after step 7\. No newer one has come"),
    ],
)
def test_a_page_says_how_old_it_is_and_when_it_is_late(
    browser: Browser, make_run: MakeRun, age: float, said: str
) -> None:
    run = make_run(steps=7)
    browser.open(write_report([run], live=Live("after step 7", clock.time() - age, 30.0)))
    assert re.search(said, browser.js("return document.getElementById('age').textContent"))
    head = browser.js("return document.querySelector('#live strong').textContent")
    assert (head == "The run goes on.") is (age < 60)
