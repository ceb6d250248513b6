"""What an update tells of its batch does not depend on which rows were dropped for having weight 0."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.distributed.strategy import Strategy
from llm_pg.learner.update import Updater, update_metrics
from llm_pg.model.policy import Policy
from llm_pg.rollouts import TextRollouts
from llm_pg.sampling.protocol import SamplingParams
from tests.model.test_policy import rollouts


def updater_of(model: Any, strategy: Strategy | None = None, **options: Any) -> Updater:
    policy = Policy(model, params=SamplingParams(), pad_id=0)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    return Updater(policy, Algorithm(ALGORITHMS["grpo"]), optimizer, scheduler, strategy, micro_rows=4, **options)


def half_silent() -> TextRollouts:
    """Six groups of three, of which the rewards of every other one are equal."""
    batch = rollouts(num_prompts=6, group=3)
    silent_B = (batch.group_B % 2 == 0).unsqueeze(1)
    last_BT = batch.reward_BT != 0
    return dataclasses.replace(batch, reward_BT=torch.where(silent_B, last_BT.float(), batch.reward_BT))


@pytest.mark.parametrize("minibatches", [1, 3])
def test_means_over_tokens_are_over_those_that_a_pass_came_by(minibatches: int, make_model: Callable[..., Any]) -> None:
    """Half of the groups say nothing and are dropped; the mean entropy is not halved by that."""
    updater, batch = updater_of(make_model("llama"), num_minibatches=minibatches), half_silent()
    weighted = updater.algorithm.compute_advantages(batch)
    told = update_metrics(updater.update(weighted, torch.arange(18).unsqueeze(0)), minibatches)
    seen_BT = batch.mask_BT & (batch.group_B % 2 == 1).unsqueeze(1)
    with torch.no_grad():
        scores = updater.policy.forward(batch)
    assert told["entropy"] == pytest.approx(float(scores.entropy_BT[seen_BT].mean()), rel=1e-4)
    gap_BT = (scores.logp_BT - batch.logp_BT).abs()
    assert told["sampler_gap"] == pytest.approx(float(gap_BT[seen_BT].mean()), rel=1e-4)


@pytest.mark.parametrize("iterations", [1, 2])
def test_losses_are_those_of_the_whole_batch_however_it_is_cut(iterations: int, make_model: Callable[..., Any]) -> None:
    """At a learning rate of 0 every cut sees the same policy, so the sum over a pass is the loss of the batch."""
    batch = rollouts(num_prompts=6, group=3)
    order = torch.arange(18).expand(iterations, -1)
    told = []
    for minibatches in (1, 3):
        updater = updater_of(make_model("llama"), num_minibatches=minibatches, num_iterations=iterations)
        weighted = dataclasses.replace(updater.algorithm.compute_advantages(batch), proximal_logp_BT=batch.logp_BT)
        told.append(update_metrics(updater.update(weighted, order), minibatches)["policy_loss"])
    assert abs(told[0]) > 1e-3
    assert told[1] == pytest.approx(told[0], rel=1e-4)


def test_a_batch_without_any_weight_makes_no_step_under_a_loss_scaler_either(make_model: Callable[..., Any]) -> None:
    """All groups are silent, so there is no gradient: the scaler has nothing to look at."""
    model, batch = make_model("llama"), rollouts(num_prompts=2, group=3)
    batch = dataclasses.replace(batch, reward_BT=(batch.reward_BT != 0).float())
    scaler = torch.amp.GradScaler("cpu")
    updater = updater_of(model, Strategy("cpu", scaler))
    stats = updater.update(updater.algorithm.compute_advantages(batch), torch.arange(6).unsqueeze(0))[0]
    assert stats.grad_norm == 0.0
