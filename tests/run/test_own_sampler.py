"""An engine of one's own samples in a trainer as the built-in ones do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.config import ConfigError
from llm_pg.sampling.native import NativeSampler
from llm_pg.terminal import Terminal

ROWS = [{"prompt": f"{a}+{b}=", "answer": str((a + b) % 10)} for a in range(4) for b in range(4)]


def digits(completion: str, **_: Any) -> float:
    return sum(character.isdigit() for character in completion) / 6


class Counted:
    """The native engine behind an object that has one method and nothing else."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.native, self.calls = NativeSampler(model, tokenizer, [tokenizer.eos_token_id]), 0

    def sample(self, *given: Any) -> Any:
        self.calls += 1
        return self.native.sample(*given)


@pytest.fixture
def trainer(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def of(name: str, own: bool = False, **changes: Any) -> Any:
        model = make_model("llama")
        settings = {"max_steps": 3, "prompts_per_step": 4, "num_generations": 4, "max_completion_length": 6}
        settings |= {"num_eval_prompts": 0, "use_cpu": True, "reward_in_process": True, "learning_rate": 1e-2}
        engine = Counted(model, tokenizer) if own else None
        made = GRPOTrainer(
            model=model,
            reward_funcs=digits,
            args=GRPOConfig(str(tmp_path), run_name=name, **settings, **changes),
            train_dataset=ROWS,
            processing_class=tokenizer,
            sampler=engine,
            terminal=Terminal(quiet=True),
        )
        return made, engine

    return of


def test_a_run_over_ones_own_engine_is_the_run_over_the_one_inside_it(trainer: Callable[..., Any]) -> None:
    own, engine = trainer("own", own=True)
    own.train()
    assert engine.calls == 3
    native, _ = trainer("native")
    native.train()
    for a, b in zip(own.model.parameters(), native.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_engine_that_keeps_no_older_weights_is_refused_by_name_where_those_are_asked_for(
    trainer: Callable[..., Any],
) -> None:
    ahead, _ = trainer("ahead", own=True, max_staleness=1)
    with pytest.raises(ConfigError, match=r"max_staleness is 1, and Counted keeps no older weights"):
        ahead.train()
