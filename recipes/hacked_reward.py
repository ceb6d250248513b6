"""A reward that is hacked, what the policy makes of it, and the probe that finds it before the run.

    python hacked_reward.py
    python hacked_reward.py max_steps=150 seed=1      # any setting of `llm-pg train --help`

The task is the last digit of a sum. The flawed reward asks whether the digit occurs anywhere in the completion; the
honest one reads the first character alone. Both score every completion, and only the flawed one is trained on
(weights 1 and 0). The policy learns to write down many digits: the trained reward goes from 0.05 to 0.6, the honest one
stays at the tenth that guessing earns. The probe writes "all answers, in a line" and needs no model for it. The same
from the command line: `llm-pg check my.yaml --probe-rewards`.
"""

from __future__ import annotations

import sys
from typing import Any

from llm_pg import GRPOConfig
from llm_pg.config.load import parse_override
from llm_pg.rewards import ProbeFinding, probe_rewards

SETTINGS: dict[str, Any] = {
    "make": {
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "engine": "native",
    "num_generations": 8,
    "max_completion_length": 10,
    "reward_weights": [1.0, 0.0],
    "pass_reward": "honest",
    "num_eval_prompts": 20,
    "max_steps": 80,
    "prompts_per_step": 16,
    "learning_rate": 3e-3,
    "logging_steps": 10,
    "overwrite": True,
    "run_name": "hacked-reward",
}
ROWS = [{"prompt": f"{a}+{b}=", "answer": str((a + b) % 10)} for a in range(10) for b in range(10)]


def flawed(completion: str, answer: str, **row: Any) -> float:
    """1 when the answer is somewhere in the completion."""
    return float(answer in completion)


def honest(completion: str, answer: str, **row: Any) -> float:
    """1 when the completion begins with the answer: one guess, whatever follows."""
    return float(completion.startswith(answer))


def probe() -> list[ProbeFinding]:
    """What each function pays for completions without work; prints those above the function's own least."""
    rows = ROWS[3:65:31]  # answers 3 and 7: where the answer is 1, a probe of ones is a lucky guess
    findings = probe_rewards([flawed, honest], [row["prompt"] for row in rows], rows)
    for name in ("flawed", "honest"):
        paid = [found.probe for found in findings if found.function == name and found.highest]
        print(f"{name}: pays for {len(paid)} of the probes" + (f", such as {', '.join(paid[:3])}" if paid else ""))
    return findings


def main(words: list[str]) -> dict[str, Any]:
    from llm_pg import GRPOTrainer  # not above: reward workers import this file too, and need no torch
    from llm_pg.doctor.live import examine_run
    from llm_pg.metrics import read_metrics

    changes = dict(parse_override(word) for word in words)
    findings = probe()
    config = GRPOConfig(**{**SETTINGS, **changes})
    trainer = GRPOTrainer(reward_funcs=[flawed, honest], args=config, train_dataset=ROWS)
    trainer.train()
    lines = read_metrics(trainer.folder.metrics)
    print(f"{'step':>5}{'flawed (trained on)':>21}{'honest':>9}")
    for line in lines[:: max(len(lines) // 8, 1)]:
        print(f"{line['step']:>5}{line['reward/flawed']:>21.3f}{line['reward/honest']:>9.3f}")
    print(f"a completion now: {trainer.evaluate().examples[0]['completion']!r}")
    for finding in examine_run(trainer.folder.path):
        print(f"doctor: {finding.rule}: {finding.evidence}")
    return {"findings": findings, "lines": lines}


if __name__ == "__main__":
    main(sys.argv[1:])
