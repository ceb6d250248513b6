"""Whole runs of episodes: plain text and conversations, every kind of row, and what is left to read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_pg import PolicyGradientTrainer
from llm_pg.config.load import check_values
from llm_pg.metrics import read_metrics
from llm_pg.terminal import Terminal
from tests.environments import partners

SMALL = {
    "max_steps": 2,
    "prompts_per_step": 4,
    "num_generations": 4,
    "max_completion_length": 48,
    "max_turn_length": 6,
    "max_turns": 3,
    "num_eval_prompts": 4,
    "eval_num_samples": 2,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "reward_workers": 1,
    "run_name": "r",
    "log_completions": 2,
    "environment": f"{partners.__name__}:Echo",
    "stop": list("abcdefghijklmnopqrstuvwxyz0123456789"),
}
TALK = [
    {"prompt": [{"role": "user", "content": f"{a}+{b}?"}], "answer": str(a + b)} for a in range(4) for b in range(5)
]
PLAIN = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(5)]


@pytest.fixture
def trainer(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def make(rows: Any, **changes: Any) -> Any:
        return PolicyGradientTrainer(
            model=make_model("llama", max_position_embeddings=256),
            args=check_values({**SMALL, "output_dir": str(tmp_path), **changes}),
            train_dataset=rows,
            processing_class=tokenizer,
            terminal=Terminal(quiet=True),
        )

    return make


def kept(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "r" / "completions" / "step-000002.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["reinforce", "rloo", "grpo", "remax", "dr_grpo", "ppo", "reinforce_plus_plus"])
def test_every_kind_of_row_trains_on_episodes(name: str, trainer: Callable[..., Any], tmp_path: Path) -> None:
    beta = {} if name == "ppo" else {"beta": 0.05}
    trainer(PLAIN, name=name, **beta).train()
    for line in read_metrics(tmp_path / "r" / "metrics.jsonl"):
        assert line["unscorable"] == line["skipped_updates"] == 0
        assert line["log/turns"] > 1
        assert line["sampler_gap"] < 1e-4  # the trainer scores the tokens in the context they were sampled in
        assert line["grad_norm"] > 0


def test_a_conversation_is_continued_in_the_words_of_its_template(
    trainer: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    trainer(TALK, name="rloo").train()
    pieces = [row["pieces"] for row in kept(tmp_path) if None in row["tokens"]["logp"]]
    assert pieces
    for row in kept(tmp_path):
        heard = "".join(p for p, v in zip(row["pieces"], row["tokens"]["logp"], strict=True) if v is None)
        turns = heard.count("\nuser: ")
        assert turns == heard.count("\n\nassistant: ")
        if turns:
            assert heard.startswith(("\nuser: ", "<eos>\nuser: "))
    assert max(line["sampler_gap"] for line in read_metrics(tmp_path / "r" / "metrics.jsonl")) < 1e-4


def test_an_evaluation_counts_the_returns_of_episodes(trainer: Callable[..., Any]) -> None:
    """Echo pays each character, so that every episode of any length passes a threshold of one."""
    made = trainer(PLAIN, name="rloo", pass_threshold=1.0)
    with made.scorer, made.collector:
        result = made.evaluate()
    assert result.greedy.mean == 1.0
    assert result.unscorable == 0
