"""A run's folder says when, where and how each of its processes was started."""

import json
import platform
import socket
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.report import write_report

ROWS = [{"prompt": f"{a}+{b}=", "answer": str((a + b) % 10)} for a in range(8) for b in range(8)]


def first_digit(completion: str, answer: str, **row: Any) -> float:
    return float(completion[:1] == answer)


def test_every_start_of_a_run_is_a_line_with_versions_command_and_no_secret(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdef0123456789")
    monkeypatch.setattr("sys.argv", ["/somewhere/llm-pg", "train", "x.yaml", "key=abcdef0123456789"])
    small = {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 3, "num_eval_prompts": 2}
    small |= {"eval_num_samples": 0, "use_cpu": True, "reward_in_process": True, "run_name": "r", "save_steps": 1}
    before = datetime.now(timezone.utc).replace(microsecond=0)
    for steps, resume in ((1, False), (2, True)):
        trainer = GRPOTrainer(
            model=make_model("llama"), processing_class=tokenizer, reward_funcs=first_digit, train_dataset=ROWS,
            args=GRPOConfig(str(tmp_path), max_steps=steps, **small),
        )  # fmt: skip
        trainer.train(resume=resume)
    lines = (tmp_path / "r" / "sessions.jsonl").read_text().splitlines()
    sessions = [json.loads(line) for line in lines]
    assert len(sessions) == 2
    for found in sessions:
        assert before <= datetime.fromisoformat(found["began"]) <= datetime.now(timezone.utc)
        assert found["host"] == socket.gethostname()
        assert found["command"] == "llm-pg train x.yaml key=[hidden]"
        assert found["versions"]["torch"] == torch.__version__
        assert found["versions"]["python"] == platform.python_version()
        assert found["ranks"] == 1
    page = write_report([tmp_path / "r"]).read_text()
    assert "Where the numbers come from (2 starts)" in page
    assert "abcdef0123456789" not in page
