"""The live rules beside a run: each finding once, early enough to act on it, at a bounded cost."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_pg.config import load_config
from llm_pg.doctor.watch import EVERY, RunWatch
from llm_pg.time_budget import TimeBudget

STEPS = 60


class Time:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def line(step: int, **changes: float) -> dict[str, Any]:
    t = step / STEPS
    healthy = {"reward": 0.3 + 0.3 * t, "reward_std": 0.45, "uniform_groups": 0.3, "unscorable": 0.0, "truncated": 0.02}
    healthy |= {"completion_length": 40.0, "kl": 0.05 * t, "entropy": 0.8 - 0.3 * t, "entropy_coef": 0.0}
    return {"step": step, "clip_fraction": 0.01, "sampler_gap": 1e-6, "grad_norm": 0.7, **healthy, **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = load_config(None, ["data.task=sort_letters", f"max_steps={STEPS}"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (tmp_path / "before.json").write_text(json.dumps({"greedy": {"mean": 0.4, "low": 0.35, "high": 0.45}}))
    return tmp_path


def watch_of(folder: Path, now: Time) -> RunWatch:
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    return RunWatch(folder, settings, budget=TimeBudget(guess=0.02, now=now))


def told(folder: Path, lines: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """(step, rule) of everything that was found, at ten seconds a step."""
    now = Time()
    watch, out = watch_of(folder, now), []
    for values in lines:
        now.seconds += 10
        out += [(values["step"], finding.rule) for finding in watch.observe(values)]
    return out


def test_a_healthy_run_is_left_in_peace(folder: Path) -> None:
    assert told(folder, [line(step) for step in range(1, STEPS + 1)]) == []


def test_a_symptom_is_told_once_within_a_few_steps(folder: Path) -> None:
    """Truncation from step 21 on: over the window from step 25, seen twice at step 30."""
    lines = [line(step, truncated=0.5 if step > 20 else 0.02) for step in range(1, STEPS + 1)]
    assert told(folder, lines) == [(30, "truncation")]


def test_a_symptom_that_passes_at_once_is_not_told(folder: Path) -> None:
    lines = [line(step, truncated=0.5 if 20 < step <= 25 else 0.0) for step in range(1, STEPS + 1)]
    assert told(folder, lines) == []


def test_what_only_the_whole_run_shows_is_told_at_its_end_and_nothing_twice(folder: Path) -> None:
    lines = [line(step, truncated=0.5, reward=0.3 + 0.5 * step / STEPS) for step in range(1, STEPS + 1)]
    now = Time()
    watch = watch_of(folder, now)
    for values in lines:
        now.seconds += 10
        watch.observe(values)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(values) + "\n" for values in lines))
    (folder / "summary.json").write_text(json.dumps({"pass_rate_after": 0.1}))
    assert watch.reported == {"truncation"}
    assert [finding.rule for finding in watch.finish()] == ["reward-hacking"]
    assert watch.finish() == []


def test_a_resumed_run_knows_its_earlier_steps(folder: Path) -> None:
    now = Time()
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    watch = RunWatch(folder, settings, [line(s, truncated=0.5) for s in range(1, 11)], TimeBudget(now=now, guess=0.02))
    found = []
    for step in range(11, 11 + 2 * EVERY):
        now.seconds += 10
        found += watch.observe(line(step, truncated=0.5))
    assert [finding.rule for finding in found] == ["truncation"]


@pytest.mark.parametrize("cost", [0.01, 0.5, 20.0])
def test_what_is_spent_on_being_seen_is_at_most_a_hundredth(cost: float) -> None:
    """Whatever a time costs; only the first one, whose cost nobody knows, may go over it."""
    now = Time()
    budget, times = TimeBudget(5.0, now=now), []
    for _ in range(20_000):
        now.seconds += 1.0
        if budget.due():
            times.append(now.seconds)
            with budget.spending():
                now.seconds += cost
    assert len(times) > 2
    assert times[0] >= 30
    assert (len(times) - 1) * cost <= 0.01 * now.seconds
    assert min(b - a for a, b in pairwise(times)) >= 5
