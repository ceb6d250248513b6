"""Folders of runs as the trainer leaves them, without the training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_browser import Browser, started
from report_rows import token_row

from llm_pg.config import load_config

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(
        name: str = "first", steps: int = 60, rows: Callable[[int], list[dict[str, Any]]] | None = None, **settings: Any
    ) -> Path:
        folder = tmp_path / name
        (folder / "completions").mkdir(parents=True)
        given = {"max_steps": steps, "data.task": "sort_letters", "prompts_per_step": 16, **settings}
        config = load_config(None, [f"{key}={value}" for key, value in given.items()])
        (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        lines = []
        for step in range(1, steps + 1):
            line = {
                "step": step,
                "reward": 0.2 + 0.6 * step / steps,
                "reward_std": 0.4,
                "entropy": math.exp(-step / 90),
            }
            line |= {"kl": 0.001 * step, "completion_length": 40.0, "grad_norm": 0.7, "uniform_groups": 0.25}
            line |= {"reward/right": 0.5, "reward/form": 0.25, "seconds": 1.5, "seconds/sample": 1.0, "truncated": 0.0}
            lines.append(line | {"seconds/update": 0.5, "tokens_per_second": 1000.0, "learning_rate": 1e-4})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        greedy = {"mean": 0.25, "low": 0.2, "high": 0.3}
        (folder / "before.json").write_text(
            json.dumps({"num_prompts": 256, "greedy": greedy, "sampled": greedy, "pass_at": {"2": greedy}})
        )
        summary = {"pass_rate_after_interval": [0.75, 0.7, 0.8], "pass_rate_after": 0.75, "steps": steps}
        summary |= {"sampled_after": 0.7, "pass_at": {"2": [0.85, 0.8, 0.9]}, "num_eval_prompts": 256}
        (folder / "summary.json").write_text(
            json.dumps({**summary, "seconds_total": 90.0, "seconds_by_phase": {"sample": 60.0, "update": 30.0}})
        )
        for step in range(1, steps + 1):
            some = rows(step) if rows else [token_row(step, g, k, ["a", " b", "</s>"]) for g in (0, 1) for k in (0, 1)]
            text = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in some)
            (folder / "completions" / f"step-{step:06d}.jsonl").write_text(text)
        return folder

    return make


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with started(tmp_path_factory.mktemp("driver") / "log.txt") as opened:
        yield opened
