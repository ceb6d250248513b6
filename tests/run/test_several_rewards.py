"""Rewards of several functions reach the algorithm one by one, whole runs long."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llm_pg import GRPOConfig, GRPOTrainer
from tests.tiny import ONE_STEP, ROWS, Recorder, digits, graded


def run(make_model: Callable[..., Any], tokenizer: Any, folder: Path, **changes: Any) -> Any:
    settings = {**ONE_STEP, "max_steps": 3, "reward_weights": [2.0, 0.5], **changes}
    trainer = GRPOTrainer(
        make_model("llama"), [graded, digits], GRPOConfig(str(folder), **settings), ROWS, processing_class=tokenizer,
        terminal=Recorder(),
    )  # fmt: skip
    batches = []
    update = trainer.policy.forward

    def seen(rollouts: Any, **given: Any) -> Any:
        batches.append(rollouts)
        return update(rollouts, **given)

    trainer.policy.forward = seen
    trainer.train()
    return batches, trainer.model.state_dict()


def test_what_each_function_said_is_beside_the_sum(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    batches, _ = run(make_model, tokenizer, tmp_path, name="gdpo", run_name="a")
    for rollouts in batches:
        total_B = (rollouts.part_reward_B * rollouts.part_weight_B).sum(1)
        torch.testing.assert_close(total_B, rollouts.reward_BT.sum(1))
        assert rollouts.part_weight_B[0].tolist() == [2.0, 0.5]


def test_trls_word_is_the_row_gdpo(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    theirs = run(make_model, tokenizer, tmp_path, run_name="b", multi_objective_aggregation="normalize_then_sum")[1]
    ours = run(make_model, tokenizer, tmp_path, run_name="c", name="gdpo")[1]
    summed = run(make_model, tokenizer, tmp_path, run_name="d", name="grpo")[1]
    assert all(torch.equal(x, theirs[key]) for key, x in ours.items())
    assert any(not torch.equal(x, theirs[key]) for key, x in summed.items())


def test_batches_sampled_ahead_and_refilled_carry_them(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    for name, more in (("e", {"max_staleness": 1}), ("f", {"dynamic_sampling_max_rounds": 2, "name": "grpo"})):
        batches, _ = run(make_model, tokenizer, tmp_path, **{"name": "gdpo", "run_name": name, **more})
        assert all(each.part_reward_B.shape == (len(each.mask_BT), 2) for each in batches)
        assert dataclasses.is_dataclass(batches[0])
