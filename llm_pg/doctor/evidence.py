"""What a run's folder tells, finished or still running, read without torch and tolerant of a line half written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from ..config import ConfigError
from ..config.check import DEFAULT_PROMPTS
from ..config.load import read_yaml

SOLVED = 0.75  # of the way from the lowest to the highest reward seen
COMPLETION_FILES = 10  # of a run that are read for the range of its rewards
ENDED = "ended.json"  # in a run's folder: when and how it ended, where that was early


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; a last line that a running process has not finished is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(value, dict):
                yield value


def json_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file; {} where there is none yet."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def prompt_of(row: dict[str, Any]) -> str:
    """The prompt of a row of completions/ or of an evaluation's example, as it was written: of a conversation its
    messages, without the marks that a chat template puts around them."""
    messages = row.get("messages") or []
    if len(messages) == 1:
        return str(messages[0].get("content", ""))
    text = "\n".join(f"{message.get('role')}: {message.get('content')}" for message in messages)
    return text or str(row.get("prompt", ""))


@dataclass
class Run:
    """One run, of language or of classic control.

    Attributes:
        path: its folder.
        name: of the folder.
        config: sections of settings as resolved.
        metrics: a dict a step.
        before: the evaluation before the first step.
        after: the evaluation after the last step; {} until then.
        summary: {} until the run has ended.
        sessions: when, where and how each of its processes was started, the first and every resume.
        ended: when (`at`) and how its last process ended before the last step; {} where it did not.
    """

    path: Path
    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    before: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    after: dict[str, Any] = field(default_factory=dict)
    ended: dict[str, Any] = field(default_factory=dict)

    def setting(self, section: str, name: str, default: Any = None) -> Any:
        value = (self.config.get(section) or {}).get(name)
        return default if value is None else value

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of the steps that measured it with a finite number."""
        counter = self.counter
        return [
            (int(m[counter]), float(m[name]))
            for m in self.metrics
            if isinstance(m.get(name), (int, float)) and math.isfinite(m[name]) and counter in m
        ]

    def values(self, name: str) -> list[float]:
        return [value for _, value in self.series(name)]

    @property
    def counter(self) -> str:
        """The metric that curves are drawn over: environment steps where there are any."""
        return "steps" if self.metrics and "steps" in self.metrics[0] else "step"

    @property
    def done(self) -> int:
        return int(self.metrics[-1].get(self.counter, 0)) if self.metrics else 0

    @property
    def max_steps(self) -> int:
        return int(self.setting("train", "max_steps", self.setting("control", "total_steps", len(self.metrics))))

    @property
    def subject(self) -> str:
        """What was trained, or what it was trained on: the model, or the environment."""
        return self.setting("control", "env") or self.setting("model", "model_name_or_path") or "made model"

    @property
    def prompts_per_step(self) -> int:
        """Groups of a step: as set, else counted in the first step, as a batch can be given in passes on each rank."""
        given = self.setting("train", "prompts_per_step")
        if given:
            return int(given)
        first = self.metrics[0] if self.metrics else {}
        tokens, length = first.get("tokens"), first.get("completion_length")
        if not tokens or not length:
            return DEFAULT_PROMPTS
        return max(round(tokens / length / self.setting("rollout", "num_generations", 8)), 1)

    def completions(self) -> list[tuple[int, Path]]:
        """(step, file) of the sampled completions, in order of steps."""
        files = sorted((self.path / "completions").glob("step-*.jsonl"))
        return [(int(f.stem.split("-")[1]), f) for f in files if f.stem.split("-")[1].isdigit()]


class RunCase:
    """A run and its last steps."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.window = min(max(len(run.metrics) // 10, 5), 50)

    def recent(self, name: str) -> float | None:
        """Mean over the last steps; None before there are enough."""
        values = self.run.values(name)
        return fmean(values[-self.window :]) if len(values) >= self.window else None

    def first(self, name: str) -> float | None:
        values = self.run.values(name)
        return fmean(values[: self.window]) if len(values) >= self.window else None

    def gain(self, name: str) -> float:
        """Of the last steps over the first ones; 0 before there are enough."""
        values = self.run.values(name)
        if len(values) < 2 * self.window:
            return 0.0
        return fmean(values[-self.window :]) - fmean(values[: self.window])

    def newest(self, name: str, in_summary: str) -> float | None:
        """Of the newest held-out evaluation: the summary's once the run has ended, else the metrics'."""
        after = self.run.summary.get(in_summary)
        if after is not None:
            return float(after[0] if isinstance(after, list) else after)
        return next(reversed(self.run.values(name)), None)

    def span(self) -> str:
        return f"over the last {self.window} steps"

    @cached_property
    def reward_range(self) -> tuple[float, float]:
        """Lowest and highest reward of the completions kept, at least [0, 1]."""
        files = self.run.completions()
        some = files[:: max(len(files) // COMPLETION_FILES, 1)] + files[-1:]
        seen = [row["reward"] for _, path in some for row in json_lines(path) if row.get("reward") is not None]
        return min(seen, default=0.0), max([1.0, *seen]) if not seen or max(seen) > 0 else max(seen)

    @property
    def solved(self) -> bool:
        reward, (low, high) = self.recent("reward"), self.reward_range
        return reward is not None and high > low and (reward - low) / (high - low) >= SOLVED

    @property
    def deciding(self) -> str:
        """The reward function that decides a pass."""
        named = self.run.setting("eval", "pass_reward")
        parts = [name.removeprefix("reward/") for m in self.run.metrics[:1] for name in m if name.startswith("reward/")]
        return named or (parts[0] if parts else "")


def read_run(path: str | Path) -> Run:
    """The run in a folder. Raises ConfigError where the folder holds no run."""
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        inside = sorted(p.parent.name for p in folder.glob("*/config.yaml")) if folder.is_dir() else []
        hint = f" Inside it are the runs {', '.join(inside)}; name one of them." if inside else ""
        raise ConfigError(f"{folder} holds no run: there is no config.yaml in it.{hint}")
    config = read_yaml(folder / "config.yaml")
    flat = [name for name, section in config.items() if not isinstance(section, dict)]
    if flat:
        raise ConfigError(f"{folder / 'config.yaml'} is no run's: {flat[0]!r} holds {config[flat[0]]!r}, not settings.")
    return Run(
        folder,
        folder.resolve().name,
        config,
        list(json_lines(folder / "metrics.jsonl")),
        json_object(folder / "before.json"),
        json_object(folder / "summary.json"),
        list(json_lines(folder / "sessions.jsonl")),
        json_object(folder / "after.json"),
        json_object(folder / ENDED),
    )
