"""A conversation as the prompt, and a reward that reads the messages: does the assistant remember what it was told?

    python conversational_reward.py                                     # a chat model from the hub, one GPU of 24 GB
    python conversational_reward.py model_name_or_path=my/folder        # a local one
    python conversational_reward.py max_steps=50 learning_rate=2e-6     # any setting of `llm-pg train --help`

A prompt is a list of messages; the model's own chat template makes the text. The reward function has TRL's form: it
gets all completions of the step at once, each a list with the assistant's message, and the columns of the data beside
them. Everything in it is checked by the program: the fact must be there, the other person's must not, and the reply
must be short, so that reciting the whole conversation does not pay.
"""

from __future__ import annotations

import random
import re
import sys
from typing import Any

from llm_pg import RLOOConfig
from llm_pg.config.load import parse_override

NAMES = ("Ada", "Bela", "Chidi", "Dora", "Emre", "Fay", "Goran", "Hana", "Ines", "Jun", "Kofi", "Lena")
PETS = ("cat", "dog", "parrot", "rabbit", "tortoise", "canary", "hamster", "goldfish")
MOST_WORDS = 12
SETTINGS: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
    "num_eval_prompts": 64,
    "num_generations": 8,
    "max_completion_length": 64,
    "max_steps": 50,
    "prompts_per_step": 16,
    "learning_rate": 1e-6,
    "bf16": True,
    "run_name": "conversational-reward",
}


def conversations(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with the columns prompt (messages), fact and other. Two people speak of their pets; one is asked about."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        (first, second), (mine, other) = rng.sample(NAMES, 2), rng.sample(PETS, 2)
        prompt = [
            {"role": "system", "content": "Answer in one short sentence."},
            {"role": "user", "content": f"I am {first} and I have a {mine}. My friend {second} has a {other}."},
            {"role": "assistant", "content": "Nice to meet you! How can I help?"},
            {"role": "user", "content": rng.choice(("Which pet do I have?", "Remind me: what is my pet?"))},
        ]
        rows.append({"prompt": prompt, "fact": mine, "other": other})
    return rows


def remembers(
    prompts: list[list[dict[str, str]]],
    completions: list[list[dict[str, str]]],
    fact: list[str],
    other: list[str],
    **columns: Any,
) -> list[float]:
    """1 for a short reply that names the user's own pet and not the friend's; else 0."""
    scores = []
    for messages, wanted, wrong in zip(completions, fact, other, strict=True):
        words = re.findall(r"[a-z]+", messages[-1]["content"].lower())
        scores.append(float(wanted in words and wrong not in words and len(words) <= MOST_WORDS))
    return scores


def main(words: list[str]) -> dict[str, Any]:
    from llm_pg import RLOOTrainer  # not above: reward workers import this file too, and need no torch

    changes = dict(parse_override(word) for word in words)
    trainer = RLOOTrainer(
        reward_funcs=remembers,
        args=RLOOConfig(**{**SETTINGS, **changes}),
        train_dataset=conversations(1_000),
    )
    print(f"What the model reads:\n{trainer.train_prompts[0].text}")
    summary = trainer.train()
    print(f"held out: {summary['pass_rate_before']:.1%} before, {summary['pass_rate_after']:.1%} after")
    return summary


if __name__ == "__main__":
    main(sys.argv[1:])
