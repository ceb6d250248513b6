"""What a run's folder tells, finished or still running, read without torch and tolerant of a line half written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..config.check import DEFAULT_PROMPTS
from ..config.load import read_yaml

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
    said = "\n".join(f"{message.get('role')}: {message.get('content')}" for message in messages)
    return said or str(row.get("prompt", ""))


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
