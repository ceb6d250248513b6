"""Model FLOPs are those of the linear layers, counted by torch itself; a traced run leaves its trace."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llm_pg.run.logs.throughput import Work, matmul_rate, tokens_to_train


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_flops_of_a_training_pass_are_what_torch_counts_without_attention(family: str, make_model: Any) -> None:
    model = make_model(family)
    ids = torch.arange(24).view(1, 24)
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    linear = {op: n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm")}
    assert sum(linear.values()) == Work(model, 1.0).flops(24)


def test_frozen_weights_need_no_gradient_of_their_own(make_model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    plain = make_model("llama")
    whole = Work(plain, 1.0)
    adapted = Work(get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"])), 1.0)
    adapter = adapted.weights - whole.weights
    assert 0 < adapter < 0.05 * whole.weights
    assert adapted.flops(1) == 4 * whole.weights + 6 * adapter


def test_utilisation_is_work_over_time_and_rate(make_model: Any) -> None:
    work = Work(make_model("llama"), rate=1e9)
    assert work.utilisation(10, 2.0) == pytest.approx(work.flops(10) / 2e9)
    assert matmul_rate(torch.device("cpu"), torch.float32) > 1e8


def test_a_prompt_is_counted_once_for_all_its_completions() -> None:
    assert tokens_to_train([(1, 2, 3), (1, 2, 3), (4, 5)], 100) == 105


def test_a_profiled_run_leaves_a_timeline_and_a_table(tmp_path: Path) -> None:
    from tests.faults.tiny_run import make

    trainer = make({"out": str(tmp_path), "name": "traced", "changes": {"max_steps": 4, "profile_steps": 2}})
    trainer.train()
    folder = trainer.folder.path / "profile"
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    assert "aten::mm" in (folder / "operations.txt").read_text()
    lines = [json.loads(line) for line in trainer.folder.metrics.read_text().splitlines()]
    assert all(0 < line["mfu"] < 1.5 and line["train_tokens_per_second"] > 0 for line in lines)


def test_the_update_is_told_by_the_rows_that_were_trained(tmp_path: Path) -> None:
    """Without any weight nothing is computed, however many completions were sampled."""
    from tests.faults.tiny_run import make

    def silent(completions: list[str], **_: object) -> list[float]:
        return [1.0] * len(completions)

    changes = {"max_steps": 1, "reward_in_process": True}
    trainer = make({"out": str(tmp_path), "name": "silent", "algorithm": "grpo", "changes": changes, "reward": silent})
    trainer.train()
    line = json.loads(trainer.folder.metrics.read_text())
    assert line["uniform_groups"] == 1.0
    assert line["tokens"] > 0
    assert line["mfu"] == line["train_tokens_per_second"] == 0
