"""A dataset that is read as a stream, through the real command: two steps, and a resume to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm_pg.cli import main
from llm_pg.metrics import read_metrics
from tests.faults.tiny_run import LIGHT
from tests.run.test_shipped_configs_train import changes

CONFIG = "gsm8k_qwen2.5-0.5b_grpo.yaml"
STREAM = ["dataset_streaming=true", "num_train_prompts=10", "num_eval_prompts=6", f"reward_funcs=[{LIGHT}:digits]"]
STREAM += ["eval_steps=0", "lr_scheduler_type=constant", "learning_rate=0.01", "report_seconds=0", "log_completions=0"]


def steps(run: Path) -> list[dict[str, Any]]:
    """The metrics of training, without what a clock says; that of the last step has no evaluation."""
    others = ("seconds", "tokens_per_second", "train_tokens_per_second", "mfu", "memory", "eval/")
    return [{k: v for k, v in line.items() if not k.startswith(others)} for line in read_metrics(run / "metrics.jsonl")]


def test_a_run_on_a_stream_goes_on_bit_for_bit_and_is_one_on_its_first_rows(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps and two more by --resume are four; a run on a list of those rows is the same one."""
    given = [*changes(CONFIG, make_model, tokenizer, tmp_path, "parquet"), *STREAM]
    asked = {
        "whole": (["max_steps=4"],),
        "parts": (["max_steps=2"], ["max_steps=4", "--resume"]),
        "rows": (["max_steps=4", "dataset_streaming=false", "dataset_split=train[:10]"],),
    }
    for name, calls in asked.items():
        for call in calls:
            assert main(["train", CONFIG, *given, f"run_name={name}", *call]) == 0, capsys.readouterr()
    whole, parts, rows = (tmp_path / "runs" / name for name in asked)
    assert steps(whole) == steps(parts) == steps(rows)
    one, two = (load_file(run / "model" / "model.safetensors") for run in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert max(line["grad_norm"] for line in steps(whole)) > 0
