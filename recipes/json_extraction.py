"""Facts from a text as JSON that fits a schema, with a reward function of its own.

    python json_extraction.py                                     # a chat model from the hub, one GPU of 24 GB
    python json_extraction.py model_name_or_path=my/folder        # a local one
    python json_extraction.py max_steps=50 learning_rate=2e-6     # any setting of `llm-pg train --help`

The reward is 0 for what is no JSON or does not fit the schema, and otherwise the share of right fields beyond those
that a constant answer gets: only `paid` has few values, and half of all bills are paid, so a guess is right half the
time. Paying for the schema alone would teach empty objects. Needs jsonschema (extra `schema`).
"""

from __future__ import annotations

import json
import random
import sys
from functools import cache
from typing import Any

from llm_pg import GRPOConfig
from llm_pg.config.load import parse_override
from llm_pg.rewards import probe_rewards

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "customer": {"type": "string"},
        "amount": {"type": "number"},
        "items": {"type": "array", "items": {"type": "string"}},
        "paid": {"type": "boolean"},
    },
    "required": ["customer", "amount", "items", "paid"],
    "additionalProperties": False,
}
SETTINGS: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
    "system_prompt": "Answer with one JSON object with the keys customer (text), amount (number), items (list of "
    "texts) and paid (true or false), and nothing else.",
    "num_eval_prompts": 64,
    "num_generations": 8,
    "max_completion_length": 128,
    "max_steps": 60,
    "prompts_per_step": 16,
    "learning_rate": 1e-6,
    "bf16": True,
    "run_name": "json-extraction",
}
NAMES = ("Ada Njoku", "Ben Ode", "Carla Ruiz", "Dmitri Volk", "Elif Kaya", "Finn Berg", "Gita Rao", "Hugo Lam")
THINGS = ("a kettle", "two lamps", "a desk", "six plates", "a rug", "a mirror", "four chairs", "a clock")


def bills(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with the columns prompt and truth (JSON text)."""
    rng, rows = random.Random(seed), []
    for _ in range(n):
        items, paid = rng.sample(THINGS, rng.randint(1, 3)), rng.random() < 0.5
        truth = {"customer": rng.choice(NAMES), "amount": rng.randint(500, 50_000) / 100, "items": items, "paid": paid}
        state = "The bill is settled." if paid else "The money has not come in yet."
        text = f"{truth['customer']} ordered {' and '.join(items)} for {truth['amount']:.2f} euros. {state}"
        rows.append({"prompt": text, "truth": json.dumps(truth)})
    return rows


@cache
def _validator() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(SCHEMA)


def extracted(completion: str, truth: str, **row: Any) -> dict[str, float]:
    """(right fields - 1) / 3, at least 0, of an object that fits the schema; else 0. The part `fits` is for the eye."""
    try:
        given = json.loads(completion)
    except (ValueError, RecursionError):
        return {"reward": 0.0, "fits": 0.0}
    if not _validator().is_valid(given):
        return {"reward": 0.0, "fits": 0.0}
    wanted = json.loads(truth)
    right = sum(given[key] == wanted[key] for key in wanted)
    return {"reward": max(0.0, (right - 1) / (len(wanted) - 1)), "fits": 1.0}


def main(words: list[str]) -> dict[str, Any]:
    from llm_pg import GRPOTrainer  # not above: reward workers import this file too, and need no torch

    changes = dict(parse_override(word) for word in words)
    rows = bills(1_000)
    findings = probe_rewards([extracted], [row["prompt"] for row in rows[:3]], rows[:3])
    paid = [finding.probe for finding in findings if finding.highest]
    print(f"{len(findings)} completions without work, paid: {', '.join(paid) or 'none'}")
    trainer = GRPOTrainer(reward_funcs=extracted, args=GRPOConfig(**{**SETTINGS, **changes}), train_dataset=rows)
    summary = trainer.train()
    print(f"held out, every field right: {summary['pass_rate_before']:.1%} -> {summary['pass_rate_after']:.1%}")
    return summary


if __name__ == "__main__":
    main(sys.argv[1:])
