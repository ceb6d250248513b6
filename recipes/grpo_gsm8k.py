"""GRPO on grade-school maths, with reward functions of its own: the answer, and a little for its form.

    python grpo_gsm8k.py                                             # model and data from the hub, one GPU of 24 GB
    python grpo_gsm8k.py dataset_name=null data_files=train.jsonl    # files of the same format: question, answer
    python grpo_gsm8k.py max_steps=50 learning_rate=2e-6 seed=1      # any setting of `llm-pg train --help`

A row of the data has "question" and "answer", a worked solution that ends in "#### 72". What a completion is worth is
decided by `correct` alone; `form` is small, so that it never pays to look right and be wrong.
"""

from __future__ import annotations

import re
import sys
from typing import Any

from llm_pg import GRPOConfig
from llm_pg.config.load import parse_override

SETTINGS: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
    "dataset_name": "openai/gsm8k",
    "dataset_config": "main",
    "prompt_template": "{question}\n\nThink step by step. Write the answer, a number, on the last line after ####.",
    "chat": True,
    "extract": {"answer": r"####\s*(.+)"},  # "... #### 72" -> "72"
    "max_prompt_length": 384,
    "long_prompts": "drop",
    "num_generations": 8,
    "max_completion_length": 512,
    "rollout_batch_size": 256,
    "reward_weights": [1.0, 0.1],
    "beta": 0.001,
    "max_steps": 200,
    "prompts_per_step": 32,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-6,
    "warmup_steps": 10,
    "bf16": True,
    "gradient_checkpointing": True,
    "eval_num_samples": 0,
    "run_name": "grpo-gsm8k",
}
FINAL = re.compile(r"####\s*\$?(-?[\d,]+(?:\.\d+)?)\s*$")


def correct(completion: str, answer: str, **row: Any) -> float:
    """1 when the number after the last #### is the answer."""
    found = FINAL.search(completion)
    return float(found is not None and _number(found[1]) == _number(answer))


def form(completion: str, **row: Any) -> float:
    """1 when there is exactly one #### and a number behind it."""
    return float(completion.count("####") == 1 and FINAL.search(completion) is not None)


def _number(text: str) -> float:
    return float(text.replace(",", "").replace("$", ""))


def main(words: list[str]) -> dict[str, Any]:
    from llm_pg import GRPOTrainer  # not above: reward workers import this file too, and need no torch

    changes = dict(parse_override(word) for word in words)
    trainer = GRPOTrainer(reward_funcs=[correct, form], args=GRPOConfig(**{**SETTINGS, **changes}))
    summary = trainer.train()
    print(f"held out: {summary['pass_rate_before']:.1%} before, {summary['pass_rate_after']:.1%} after")
    return summary


if __name__ == "__main__":
    main(sys.argv[1:])
