"""The page of a run that goes on says so and loads itself again; the last page does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llm_pg.report import LivePage, write_report
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
