"""A training loop of your own, made of the pieces that the trainers are made of; a test holds that both end with the
same weights, bit for bit.

    python own_loop.py MODEL                          # hub id or folder; RLOO on sums
    python own_loop.py MODEL --algorithm grpo --beta 0.04
    python own_loop.py MODEL --algorithm ppo          # with a learned critic
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from llm_pg import Algorithm, Learner, Policy, Prompts, Sampler, Scorer

ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]


def first_number(completion: str, answer: str) -> float:
    """1 where the completion begins with the answer."""
    return float(completion.strip().startswith(answer))


def train(
    policy: Policy, rows: list[dict[str, Any]], reward: Any, algorithm: str, *, num_steps: int = 100, beta: float = 0.0,
    per_step: int = 8, num_generations: int = 8, learning_rate: float = 1e-5, seed: int = 0,
) -> Policy:  # fmt: skip
    rule = Algorithm(algorithm, policy.params.max_completion_length, beta=beta)
    groups: list[dict[str, Any]] = [{"params": policy.parameters()}]
    if rule.spec.needs_critic:
        groups.append({"params": policy.add_critic().trainable(), "lr": 3e-3})
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0.0, fused=True)
    prompts = Prompts(rows, policy.tokenizer, per_step=per_step, seed=seed)
    sampler, learner = Sampler(policy), Learner(policy, rule, optimizer, seed=seed)
    with Scorer([reward], in_process=True) as scorer:
        for step in range(num_steps):
            samples = sampler.sample(prompts[step], num_generations, seed=(seed, step))
            update = learner.update(scorer.score(samples))
            print(f"step {step + 1}: {samples.texts[0]!r}, gradient {update.metrics['grad_norm']:.3f}")
    return policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--algorithm", default="rloo")
    parser.add_argument("--beta", type=float, default=0.0, help="weight of the KL to the model as it begins")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="runs/own_loop")
    given = parser.parse_args()
    policy = Policy.from_pretrained(given.model, max_completion_length=8)
    train(policy, ROWS, first_number, given.algorithm, num_steps=given.steps, beta=given.beta)
    policy.save_pretrained(given.out)


if __name__ == "__main__":
    main()
