"""What the rows of completions/ say of each token, against a forward pass of our own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.terminal import Terminal

ROWS = [{"prompt": f"{a}+{b}=", "answer": str((a + b) % 10)} for a in range(8) for b in range(8)]


def first_digit(completion: str, answer: str, **row: Any) -> float:
    return float(completion[:1].isdigit())


@pytest.fixture
def rows_of(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def run(**changes: Any) -> Any:
        settings = {"max_steps": 1, "prompts_per_step": 6, "num_generations": 4, "max_completion_length": 5}
        settings |= {"num_eval_prompts": 4, "eval_num_samples": 0, "learning_rate": 1e-3, "use_cpu": True}
        settings |= {"reward_in_process": True, "engine": "native", "beta": 0.1}
        trainer = GRPOTrainer(
            model=make_model("llama"),
            reward_funcs=first_digit,
            args=GRPOConfig(str(tmp_path), **{**settings, **changes}),
            train_dataset=ROWS,
            processing_class=tokenizer,
            terminal=Terminal(console=Console(quiet=True)),
        )
        trainer.train()
        file = trainer.folder.path / "completions" / "step-000001.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    return run


@torch.no_grad()
def own_entropies(model: Any, tokenizer: Any, row: dict[str, Any]) -> list[float]:
    prompt = tokenizer(row["prompt"])["input_ids"]
    logits = model(torch.tensor([prompt + row["ids"]])).logits[0, len(prompt) - 1 : -1]
    distribution = torch.distributions.Categorical(logits=logits)
    return [float(x) for x in distribution.entropy()]


def test_entropies_are_those_of_the_weights_that_sampled_and_ratios_are_one_on_policy(
    rows_of: Callable[..., Any], make_model: Callable[..., Any], tokenizer: Any
) -> None:
    rows, model = rows_of(), make_model("llama").eval()
    assert len(rows) == 24
    for row in rows:
        count = len(row["ids"])
        assert row["tokens"]["entropy"] == pytest.approx(own_entropies(model, tokenizer, row), abs=2e-4)
        assert row["tokens"]["ratio"] == pytest.approx([1.0] * count, abs=2e-4)
        assert row["tokens"]["kl"] == pytest.approx([0.0] * count, abs=1e-4)  # the reference is the start


def test_rows_that_no_pass_came_by_say_nothing_of_entropy_and_ratio(rows_of: Callable[..., Any]) -> None:
    """Without a penalty a group of equal rewards has weight 0 and is dropped before the forward pass."""
    rows = rows_of(beta=0.0)
    dropped = [row for row in rows if not any(row["tokens"]["weight"])]
    assert 0 < len(dropped) < len(rows)
    for row in rows:
        assert ("entropy" in row["tokens"]) == ("ratio" in row["tokens"]) == (row not in dropped)
        assert "kl" not in row["tokens"]


def test_the_ratio_is_that_of_the_last_pass_and_the_entropy_that_of_the_first(
    rows_of: Callable[..., Any], make_model: Callable[..., Any], tokenizer: Any
) -> None:
    rows, model = rows_of(num_iterations=3, learning_rate=1e-2), make_model("llama").eval()
    assert any(abs(ratio - 1) > 0.01 for row in rows for ratio in row["tokens"]["ratio"])
    for row in rows:
        assert row["tokens"]["entropy"] == pytest.approx(own_entropies(model, tokenizer, row), abs=2e-4)
