"""The trackers themselves, each in a process of its own and without a network: numbers and completions arrive."""

import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_pg import GRPOConfig
from llm_pg.config import ConfigError
from llm_pg.run.logs.tracker_kinds import TrackedRun, check_trackers, group_of
from llm_pg.run.logs.trackers import LONGEST_TEXT, MOST_ROWS, completions_table
from llm_pg.run.saving.folder import RunFolder
from tests.faults.conftest import Ended, tiny
from tests.faults.tiny_run import LIGHT

__all__ = ["tiny"]


@pytest.fixture
def tracked(tiny: Callable[..., Ended]) -> Callable[..., str]:
    """tracked(tracker, resume, **environment): a run of four steps that writes a line every second one, or the two
    steps that follow it; what it printed."""

    def run(tracker: str, resume: bool = False, **env: str) -> str:
        changes = {"report_to": [tracker], "max_steps": 6 if resume else 4, "logging_steps": 2}
        changes |= {"reward_in_process": True, "save_steps": 2, "num_eval_prompts": 4, "tracker_tags": ["tiny", "two"]}
        others = {k: "" for k in os.environ if k.startswith(("WANDB", "TRACKIO", "MLFLOW"))}
        given = {"changes": changes, "reward": f"{LIGHT}:digits", "inside_folder": True}
        done = tiny("r", env={**others, **env}, resume=resume, **given)
        assert done.status == 0, done.output
        assert "Nothing more is sent" not in done.output, done.output
        return done.output

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
    tmp_path: Path, tracked: Callable[..., str]
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked("tensorboard")
    [folder] = {path.parent for path in tmp_path.rglob("events.out.tfevents.*") if path.parent.parent.name == "r"}
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


def test_wandb_offline_keeps_the_tables_of_completions(tmp_path: Path, tracked: Callable[..., str]) -> None:
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


def test_trackio_keeps_numbers_and_tables_on_this_machine(tmp_path: Path, tracked: Callable[..., str]) -> None:
    pytest.importorskip("trackio")
    tracked("trackio", TRACKIO_DIR=str(tmp_path / "t"), HOME=str(tmp_path), HF_HOME=str(tmp_path / "hf"))
    [file] = [path for path in tmp_path.rglob("*.db") if "llm_pg" in path.name]
    with sqlite3.connect(file) as base:
        rows = [(step, json.loads(text)) for step, text in base.execute("select step, metrics from metrics")]
    steps = {step for step, values in rows if "reward" in values}
    tables = {step for step, values in rows if "completions" in values}
    assert steps == {1, 2, 3, 4}
    assert tables == {2, 4}


# --- a run that goes on is the same run there, and what it came to is in its summary


def test_tensorboard_has_one_folder_a_run_and_each_step_once(tmp_path: Path, tracked: Callable[..., str]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first, second = tracked("tensorboard"), tracked("tensorboard", resume=True)
    assert all("tensorboard: tensorboard --logdir" in output for output in (first, second))
    [folder] = {path.parent for path in tmp_path.rglob("events.out.tfevents.*") if path.parent.parent.name == "r"}
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [e.step for e in events.Scalars("reward")] == [1, 2, 3, 4, 5, 6]
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert events.Scalars("summary/pass_rate_after")[-1].value == pytest.approx(summary["pass_rate_after"])


def test_wandb_goes_on_with_its_run_by_its_name_group_and_tags(tmp_path: Path, tracked: Callable[..., str]) -> None:
    pytest.importorskip("wandb")
    (tmp_path / "home").mkdir()
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "HOME": str(tmp_path / "home"), "WANDB_SILENT": "true"}
    first, second = tracked("wandb", **env), tracked("wandb", resume=True, **env)
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    ids = [path.stem.removeprefix("run-") for path in files]
    assert len(ids) == 2
    assert len(set(ids)) == 1
    assert ids[0] == json.loads((tmp_path / "r" / "trackers.json").read_text())["wandb"]
    assert f"wandb: wandb sync {files[0].parent}" in first
    assert f"wandb: wandb sync {files[1].parent}" in second
    kept = files[1].read_bytes()
    assert b"tiny" in kept
    assert b"two" in kept
    assert b"pass_rate_after" in kept  # of the summary


def test_trackio_goes_on_with_its_run_by_its_name(tmp_path: Path, tracked: Callable[..., str]) -> None:
    pytest.importorskip("trackio")
    env = {"TRACKIO_DIR": str(tmp_path / "t"), "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    first, _ = tracked("trackio", **env), tracked("trackio", resume=True, **env)
    assert 'trackio: trackio show --project "llm_pg"' in first
    [file] = [path for path in tmp_path.rglob("*.db") if "llm_pg" in path.name]
    with sqlite3.connect(file) as base:
        rows = list(base.execute("select run_name, step, metrics from metrics"))
    assert {name for name, _, _ in rows} == {"r"}
    assert sorted(step for _, step, text in rows if "reward" in json.loads(text)) == [1, 2, 3, 4, 5, 6]


def test_mlflow_goes_on_with_its_run_on_this_machine(tmp_path: Path, tracked: Callable[..., str]) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")  # mlflow-skinny keeps no runs on this machine
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    env = {"MLFLOW_TRACKING_URI": address, "HOME": str(tmp_path)}
    first, _ = tracked("mlflow", **env), tracked("mlflow", resume=True, **env)
    assert f"mlflow: mlflow ui --backend-store-uri {address}" in first
    client = mlflow.MlflowClient(address)
    [run] = client.search_runs([client.get_experiment_by_name("llm_pg").experiment_id])
    assert run.info.run_name == "r"
    assert run.data.tags["group"] == "r"
    assert run.data.tags["tag.tiny"] == "true"
    assert sorted({each.step for each in client.get_metric_history(run.info.run_id, "reward")}) == [1, 2, 3, 4, 5, 6]
    assert "summary/pass_rate_after" in run.data.metrics
    assert (run.data.params["train.max_steps"], run.data.tags["changed.train.max_steps"]) == ("4", "6")


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="report_to names aim, and its package aim is not installed: pip install aim"):
        check_trackers(GRPOConfig(str(tmp_path), report_to=["aim"]))


@pytest.mark.parametrize(
    "name, group", [("task-grpo-seed3", "task-grpo"), ("mine", "mine"), ("a-seedling", "a-seedling")]
)
def test_a_group_is_the_name_without_the_seed(name: str, group: str) -> None:
    assert group_of(name) == group


def test_a_run_that_begins_anew_leaves_nothing_of_an_earlier_one_to_its_trackers(tmp_path: Path) -> None:
    folder = RunFolder(GRPOConfig(str(tmp_path), run_name="r"))
    old = TrackedRun("p", "r", folder.path, "g", start=2)
    (folder.path / "tensorboard").mkdir(parents=True)
    (folder.path / "tensorboard" / "events.out.tfevents.1").touch()
    old.keep_id("mlflow", "earlier")
    assert old.known_id("mlflow") == "earlier"
    folder.begin({})
    assert old.known_id("mlflow") is None
    assert not (folder.path / "tensorboard").exists()
