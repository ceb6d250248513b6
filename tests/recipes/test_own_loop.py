"""A loop of one's own, as recipes/own_loop.py writes it, is the trainer's: the same weights to the last bit."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import own_loop
import pytest
import torch

from llm_pg import ActorCriticTrainer, GRPOTrainer, Policy, ReinforceTrainer, RLOOTrainer, Sampler
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.terminal import Terminal

ROWS = [{"prompt": f"{a}+{b}=", "answer": str((a + b) % 10)} for a in range(4) for b in range(6)]
TRAINERS = {
    "reinforce": (ReinforceTrainer, 0.0),
    "rloo": (RLOOTrainer, 0.0),
    "grpo": (GRPOTrainer, 0.04),
    "ppo": (ActorCriticTrainer, 0.0),
}


def digits(completion: str, answer: str) -> float:
    return sum(character.isdigit() for character in completion) / 6


@pytest.mark.parametrize("algorithm", TRAINERS)
def test_own_loop_and_trainer_end_with_the_same_bits(
    algorithm: str, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    kind, beta = TRAINERS[algorithm]
    start = make_model("llama")
    settings: dict[str, Any] = {"max_steps": 10, "prompts_per_step": 4, "num_generations": 4, "beta": beta}
    settings |= {"max_completion_length": 6, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "seed": 3}
    settings |= {
        "num_eval_prompts": 0,
        "use_cpu": True,
        "reward_in_process": True,
        "weight_decay": 0.0,
        "noise_steps": 0,
    }
    trainer = kind(
        model=copy.deepcopy(start),
        reward_funcs=digits,
        args=kind.default_config(str(tmp_path), run_name="r", **settings),
        train_dataset=ROWS,
        processing_class=tokenizer,
        terminal=Terminal(quiet=True),
    )
    trainer.train()
    policy = Policy(copy.deepcopy(start), params=SamplingParams(max_completion_length=6), tokenizer=tokenizer)
    own_loop.train(
        policy, ROWS, digits, algorithm, num_steps=10, beta=beta, per_step=4, num_generations=4, learning_rate=1e-2,
        seed=3,
    )  # fmt: skip
    theirs = dict(trainer.model.named_parameters())
    for name, own in policy.model.named_parameters():
        assert torch.equal(own, theirs[name]), name
    assert not torch.equal(own, dict(start.named_parameters())[name])
    if algorithm == "ppo":
        assert policy.critic is not None
        assert trainer.policy.critic is not None
        for a, b in zip(policy.critic.trainable(), trainer.policy.critic.trainable(), strict=True):
            assert torch.equal(a, b)


def test_the_recipe_is_short() -> None:
    assert len(Path(own_loop.__file__).read_text().splitlines()) <= 60


@pytest.mark.parametrize("bf16", [False, True])
def test_a_policy_in_bfloat16_is_sampled_in_the_type_that_it_is_trained_in(
    bf16: bool, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    make_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = Policy.from_pretrained(tmp_path, max_completion_length=6, bf16=bf16, device="cpu")
    engine = Sampler(policy).engine
    assert engine.dtype == (torch.bfloat16 if bf16 else None)  # type: ignore[attr-defined]
