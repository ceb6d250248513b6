"""Programs judged by unit tests, in the sandbox: GRPO on MBPP, or on files of its format.

    python code_unit_tests.py                                               # from the hub, one GPU of 24 GB
    python code_unit_tests.py dataset_name=null data_files=problems.jsonl   # rows: text, code, test_list
    python code_unit_tests.py --check dataset_name=null data_files=problems.jsonl   # only look at the tests

Before anything is sampled, the reference solutions of some rows go through the very same reward: a row whose own
solution fails is broken, and a row that pays an empty answer is hackable. The model's programs run without network,
without your files and under limits of time and memory; SECURITY.md says what the sandbox holds and what it does not.
"""

from __future__ import annotations

import sys
from typing import Any

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.config.load import parse_override
from llm_pg.prompts.sources import read_sources
from llm_pg.rewards import Scorer

SETTINGS: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen2.5-Coder-1.5B-Instruct",
    "dataset_name": "google-research-datasets/mbpp",
    "dataset_config": "full",
    "prompt_template": "{text}\nYour function must pass such tests:\n{test_list}\nAnswer with one ```python block.",
    "chat": True,
    "reward_funcs": ["mbpp_tests"],
    "reward_workers": 4,
    "reward_timeout": 15.0,  # over the 6 s that the tests of one program may take
    "num_eval_prompts": 64,
    "max_prompt_length": 512,
    "long_prompts": "drop",
    "num_generations": 8,
    "max_completion_length": 384,
    "rollout_batch_size": 128,
    "max_steps": 100,
    "prompts_per_step": 16,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-6,
    "bf16": True,
    "gradient_checkpointing": True,
    "pass_threshold": 1.0,  # a pass is every test, the reward is the share of them
    "eval_num_samples": 0,
    "run_name": "code-unit-tests",
}
CHECKED = 20


def check_tests(config: GRPOConfig) -> list[str]:
    """What is wrong with the tests of the first rows, in words."""
    rows = read_sources(config)[0].rows[:CHECKED]
    problems = []
    with Scorer(["mbpp_tests"], deadline=15.0, max_unscorable=1.0) as scorer:
        for name, texts in (("reference solution", [row["code"] for row in rows]), ("empty answer", [""] * len(rows))):
            scores = scorer.grade([row["text"] for row in rows], texts, [[0]] * len(rows), rows)
            for row, score in zip(rows, scores.parts["mbpp_tests"], strict=True):
                if score != (1.0 if name == "reference solution" else 0.0):
                    earned = "cannot be scored" if score is None else f"earns {score:g}"
                    problems.append(f"{row['text'][:60]!r}: the {name} {earned}")
    return problems


def main(words: list[str]) -> dict[str, Any]:
    only_check = "--check" in words
    changes = dict(parse_override(word) for word in words if word != "--check")
    config = GRPOConfig(**{**SETTINGS, **changes})
    problems = check_tests(config)
    print(f"tests of the first {CHECKED} rows: " + ("; ".join(problems) or "references pass, empty answers earn 0"))
    if only_check:
        return {"problems": problems}
    summary = GRPOTrainer(args=config).train()
    print(f"held out, all tests passed: {summary['pass_rate_before']:.1%} -> {summary['pass_rate_after']:.1%}")
    return {"problems": problems, **summary}


if __name__ == "__main__":
    main(sys.argv[1:])
