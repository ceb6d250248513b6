"""The trackers themselves, each in a process of its own and without a network: numbers and completions arrive."""

import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_pg.run.trackers import LONGEST_TEXT, MOST_ROWS, completions_table
from tests.faults.conftest import Ended, tiny
from tests.faults.tiny_run import LIGHT

__all__ = ["tiny"]


@pytest.fixture
def tracked(tiny: Callable[..., Ended]) -> Callable[..., None]:
    """tracked(tracker, **environment): a run of four steps that writes a line every second one."""

    def run(tracker: str, **env: str) -> None:
        changes = {"report_to": [tracker], "max_steps": 4, "logging_steps": 2, "reward_in_process": True}
        others = {k: "" for k in os.environ if k.startswith(("WANDB", "TRACKIO"))}
        given = {"changes": changes, "reward": f"{LIGHT}:digits", "inside_folder": True}
        done = tiny("r", env={**others, **env}, **given)
        assert done.status == 0, done.output
        assert "Nothing more is sent" not in done.output, done.output

    return run


def row(**changes: Any) -> dict[str, Any]:
    given = {"prompt": "p", "completion": "c", "reward": 1.0, "parts": {"a": 1.0}, "ids": [1, 2], "truncated": False}
    return {**given, **changes}


def test_a_table_is_bounded_and_keeps_what_is_unscorable_empty() -> None:
    rows = [row(completion="x" * 5000, reward=None, parts={"a": None})] * 100
    columns, data = completions_table(rows, 7)
    assert columns == ["step", "prompt", "completion", "reward", "reward/a", "tokens", "truncated"]
    assert len(data) == MOST_ROWS
    assert data[0] == [7, "p", "x" * LONGEST_TEXT, None, None, 2, False]


def test_tensorboard_holds_the_numbers_of_every_step_and_the_completions_as_text(
    tmp_path: Path, tracked: Callable[..., None]
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked("tensorboard")
    [folder] = {path.parent for path in tmp_path.rglob("events.out.tfevents.*") if path.parent.name == "llm_pg"}
    events = EventAccumulator(str(folder))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("reward")] == [
        (line["step"], line["reward"]) for line in lines
    ]
    texts = events.Tensors("completions/text_summary")
    assert [event.step for event in texts] == [2, 4]
    text = texts[0].tensor_proto.string_val[0].decode()
    assert text.startswith("| step | prompt | completion | reward |")
    assert len(text.splitlines()) == 2 + MOST_ROWS


def test_wandb_offline_keeps_the_tables_of_completions(tmp_path: Path, tracked: Callable[..., None]) -> None:
    pytest.importorskip("wandb")
    home = tmp_path / "home"
    home.mkdir()
    tracked("wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path), HOME=str(home), WANDB_SILENT="true")
    [run] = (tmp_path / "wandb").glob("offline-run-*")
    tables = sorted((run / "files" / "media" / "table").rglob("completions_*.table.json"))
    assert len(tables) == 2
    table = json.loads(tables[0].read_text())
    assert table["columns"][:3] == ["step", "prompt", "completion"]
    first = json.loads((tmp_path / "r" / "completions" / "step-000002.jsonl").read_text().splitlines()[0])
    same = [line for line in table["data"] if line[1:3] == [first["prompt"], first["completion"]]]
    assert same
    assert {line[0] for line in table["data"]} <= {2, 4}
    assert len(table["data"]) == MOST_ROWS


def test_trackio_keeps_numbers_and_tables_on_this_machine(tmp_path: Path, tracked: Callable[..., None]) -> None:
    pytest.importorskip("trackio")
    tracked("trackio", TRACKIO_DIR=str(tmp_path / "t"), HOME=str(tmp_path), HF_HOME=str(tmp_path / "hf"))
    [file] = [path for path in tmp_path.rglob("*.db") if "llm_pg" in path.name]
    with sqlite3.connect(file) as base:
        rows = [(step, json.loads(text)) for step, text in base.execute("select step, metrics from metrics")]
    steps = {step for step, values in rows if "reward" in values}
    tables = {step for step, values in rows if "completions" in values}
    assert steps == {1, 2, 3, 4}
    assert tables == {2, 4}
