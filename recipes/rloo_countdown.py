"""RLOO on countdown (reach a target with three numbers, + and -), whole on a laptop: no GPU, no download.

    python rloo_countdown.py
    python rloo_countdown.py max_steps=400 num_generations=16 seed=1      # any setting of `llm-pg train --help`

A model of half a million parameters is made, sees demonstrations of which a fifth are wrong, and goes on by RLOO: the
baseline of a completion is the mean reward of the others of its group, so the expected update is the gradient itself.
Seed 0: held-out puzzles solved greedily go from 24 % to 34 % in 100 steps, about two minutes on two cores.
"""

from __future__ import annotations

import sys
from typing import Any

from llm_pg import RLOOConfig, RLOOTrainer
from llm_pg.config.load import parse_override
from llm_pg.metrics import read_metrics

SETTINGS: dict[str, Any] = {
    "make": {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
    "task": "countdown",
    "task_options": {"num_numbers": 3, "high": 20, "operators": "+-"},
    "num_train_prompts": 3500,
    "engine": "native",
    "num_generations": 8,
    "max_completion_length": 10,
    "warm_start_steps": 250,
    "warm_start_learning_rate": 3e-3,
    "warm_start_options": {"noise": 0.2},
    "beta": 0.01,  # KL to the model after the warm start
    "max_steps": 100,
    "prompts_per_step": 32,
    "learning_rate": 3e-4,
    "warmup_steps": 10,
    "lr_scheduler_type": "linear",
    "logging_steps": 10,
    "overwrite": True,
    "run_name": "rloo-countdown",
}


def main(words: list[str]) -> dict[str, Any]:
    changes = dict(parse_override(word) for word in words)
    trainer = RLOOTrainer(args=RLOOConfig(**{**SETTINGS, **changes}))
    summary = trainer.train()
    lines = read_metrics(trainer.folder.metrics)
    silent = sum(line["uniform_groups"] for line in lines) / len(lines)
    print(f"held out, greedy: {summary['pass_rate_before']:.1%} before, {summary['pass_rate_after']:.1%} after")
    print(f"groups in which all completions earned the same, and nothing was learned: {silent:.0%}")
    return summary


if __name__ == "__main__":
    main(sys.argv[1:])
