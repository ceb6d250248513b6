"""A loss function of one's own trains what `llm-pg prove --loss` proves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.config import ConfigError
from llm_pg.terminal import Terminal

CLIPPED = """
from llm_pg.estimators.surrogates import clipped
from llm_pg.estimators.ratios import importance_ratio

def mine(logp_BT, batch):
    ratio_BT = importance_ratio(logp_BT, batch.proximal_logp_BT, batch.mask_BT, "token")
    return (batch.loss_scale_BT * clipped(ratio_BT, batch.advantage_BT, epsilon=0.2)).sum()

def a_row(logp_BT, batch):
    return logp_BT.sum(1)
"""
ROWS = [{"prompt": f"{a}+{b}="} for a in range(4) for b in range(4)]


def digits(completion: str, **_: Any) -> float:
    return sum(character.isdigit() for character in completion) / 6


@pytest.fixture
def train(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    (tmp_path / "mine.py").write_text(CLIPPED)

    def run(name: str, **changes: Any) -> Any:
        settings = {"max_steps": 3, "prompts_per_step": 4, "num_generations": 4, "max_completion_length": 6}
        settings |= {"num_eval_prompts": 0, "use_cpu": True, "reward_in_process": True, "learning_rate": 1e-2}
        settings |= {"num_iterations": 2, "beta": 0.05, "per_device_train_batch_size": 3, **changes}
        trainer = GRPOTrainer(
            model=make_model("llama"),
            reward_funcs=digits,
            args=GRPOConfig(str(tmp_path), run_name=name, **settings),
            train_dataset=ROWS,
            processing_class=tokenizer,
            terminal=Terminal(quiet=True),
        )
        trainer.train()
        return trainer

    return run


def test_the_clipped_loss_as_a_function_trains_what_the_word_clip_trains(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    own, word = train("own", surrogate=f"{tmp_path}/mine.py:mine"), train("word", surrogate="clip")
    for a, b in zip(own.model.parameters(), word.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_loss_that_is_no_scalar_is_named(train: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss function of algorithm grpo returned shape"):
        train("bad", surrogate=f"{tmp_path}/mine.py:a_row")


def test_what_cannot_be_a_loss_is_refused_when_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CLIPPED)
    with pytest.raises(ConfigError, match="has no function 'mein'"):
        GRPOConfig(str(tmp_path), surrogate=f"{tmp_path}/mine.py:mein")
    with pytest.raises(ConfigError, match="Did you mean 'clip'"):
        GRPOConfig(str(tmp_path), surrogate="clipp")
    with pytest.raises(ValueError, match="cannot be corrected for the sampler"):
        Algorithm("grpo", loss=lambda logp_BT, batch: logp_BT.sum(), vllm_importance_sampling_correction=True)
