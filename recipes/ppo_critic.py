"""PPO with a learned critic and GAE, whole on a laptop: no GPU, no download.

    python ppo_critic.py
    python ppo_critic.py name=a2c lam=1.0                     # A2C on Monte Carlo returns
    python ppo_critic.py lam=0.9 critic_kind=model seed=1     # any setting of `llm-pg train --help`

The critic says at every token what the completion will earn, so one completion a prompt is enough: no group. It is a
small network on the policy's hidden states (`critic_kind=head`) or a second model. λ of GAE trades its error against
the noise of the return: λ = 1 is exact whatever the critic says, λ = 0 believes it. Prints how much of the returns the
critic predicts, beside the reward. Seed 0: words sorted go from 7 % to 95 % (held out, greedy), in about two minutes.
"""

from __future__ import annotations

import sys
from typing import Any

from llm_pg import ActorCriticConfig, ActorCriticTrainer
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
    "task": "sort_letters",
    "engine": "native",
    "num_generations": 1,
    "max_completion_length": 8,
    "warm_start_steps": 200,
    "warm_start_learning_rate": 3e-3,
    "warm_start_options": {"noise": 0.65, "wrong": "backwards"},  # most demonstrations sort from last to first
    "lam": 0.95,
    "critic_warmup_steps": 10,  # a critic that knows nothing yet would steer the policy at random
    "max_steps": 100,
    "prompts_per_step": 256,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "linear",
    "logging_steps": 10,
    "overwrite": True,
    "run_name": "ppo-critic",
}


def main(words: list[str]) -> dict[str, Any]:
    changes = dict(parse_override(word) for word in words)
    trainer = ActorCriticTrainer(args=ActorCriticConfig(**{**SETTINGS, **changes}))
    summary = trainer.train()
    lines = read_metrics(trainer.folder.metrics)
    print(f"{'step':>5}{'reward':>9}{'explained variance':>20}")
    for line in lines[:: max(len(lines) // 10, 1)]:
        explained = line.get("explained_variance")  # not there where all returns of a step are equal
        print(f"{line['step']:>5}{line['reward']:>9.3f}" + (f"{explained:>20.3f}" if explained is not None else ""))
    print(f"held out, greedy: {summary['pass_rate_before']:.1%} before, {summary['pass_rate_after']:.1%} after")
    return summary


if __name__ == "__main__":
    main(sys.argv[1:])
