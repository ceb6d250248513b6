"""RAE in a run: a running mean for each value of a real column, brought back when the run is resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg import PolicyGradientTrainer
from llm_pg.config.load import check_values
from llm_pg.estimators.baselines import RunningMeans
from llm_pg.terminal import Terminal

ROWS = [
    {"prompt": f"{a}+{b}=", "role": ("player", "judge")[(a + b) % 2], "pays": (a + b) % 2 * 5}
    for a in range(6)
    for b in (1, 2)
]
DECAY = 0.95  # of the row `rae`


class Recorded:
    """A reward that differs by the role, and what it paid in each call."""

    def __init__(self) -> None:
        self.batches: list[dict[str, list[float]]] = []

    def __call__(self, completion_ids: Any, role: Any, pays: Any, **_: Any) -> list[float]:
        rewards = [sum(ids) % 3 + paid for ids, paid in zip(completion_ids, pays, strict=True)]
        by_role: dict[str, list[float]] = {}
        for name, reward in zip(role, rewards, strict=True):
            by_role.setdefault(name, []).append(reward)
        self.batches.append(by_role)
        return rewards


def test_each_role_has_its_own_mean_in_a_run_and_a_resumed_run_is_the_whole_one(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    def run(name: str, resume: str | None = None) -> tuple[Any, Recorded]:
        reward = Recorded()
        trainer = PolicyGradientTrainer(
            model=make_model("llama"),
            reward_funcs=reward,
            args=check_values({
                "name": "rae", "baseline_column": "role", "max_steps": 4, "prompts_per_step": 3, "num_generations": 2,
                "max_completion_length": 3, "num_eval_prompts": 0, "learning_rate": 1e-2, "use_cpu": True,
                "reward_in_process": True, "save_steps": 2, "audit_rewards": "none", "output_dir": str(tmp_path),
                "run_name": name,
            }),
            train_dataset=ROWS,
            processing_class=tokenizer,
            terminal=Terminal(quiet=True),
        )  # fmt: skip
        trainer.train(resume)
        return trainer, reward

    whole, reward = run("whole")
    assert len(reward.batches) == 4
    means = whole.algorithm.running_means
    for role in ("player", "judge"):
        total = weight = 0.0
        for batch in reward.batches:
            if role in batch:
                total = DECAY * total + (1 - DECAY) * sum(batch[role]) / len(batch[role])
                weight = DECAY * weight + (1 - DECAY)
        found = means.value_B(torch.tensor([RunningMeans.role_of(role)]))
        assert float(found) == pytest.approx(total / weight)
    resumed, second = run("resumed", str(tmp_path / "whole" / "checkpoints" / "step-000002"))
    assert second.batches == reward.batches[2:]
    assert resumed.algorithm.running_means.state_dict() == means.state_dict()
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
