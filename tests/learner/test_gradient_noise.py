"""Signal and noise of a step's gradient, as the update measures them, against the groups' own gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.estimators.noise import GradientNoise
from llm_pg.learner.update import Updater
from llm_pg.model.policy import Policy
from llm_pg.sampling.protocol import SamplingParams
from tests.model.test_policy import rollouts


def updater_of(model: Any, micro_rows: int = 64) -> Updater:
    policy = Policy(model, params=SamplingParams(), pad_id=0)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    return Updater(
        policy, Algorithm(ALGORITHMS["rloo"]), optimizer, scheduler, micro_rows=micro_rows,
        max_grad_norm=0.0,
    )  # fmt: skip


def measured(updater: Updater, batch: Any) -> tuple[GradientNoise | None, torch.Tensor]:
    rows = torch.arange(len(batch.mask_BT)).unsqueeze(0)
    stats = updater.update(updater.algorithm.compute_advantages(batch), rows, measure_noise=True)[0]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in updater.policy.parameters()]
    return stats.noise, torch.cat([g.reshape(-1) for g in grads])


def test_the_estimates_are_those_of_the_two_halves_of_the_groups(make_model: Callable[..., Any]) -> None:
    """Halves recomputed apart: with n = N/2 each, |μ|² = 2 g1·g2 · 2 and tr Σ = N (|g|² - |μ|²)."""
    model, batch = make_model("llama"), rollouts(num_prompts=6, group=3)
    noise, whole = measured(updater_of(model), batch)
    assert noise is not None
    halves = [(batch.group_B % 2 == parity).nonzero().squeeze(1) for parity in (0, 1)]
    first, second = (measured(updater_of(model), batch.rows(index))[1] / 2 for index in halves)
    torch.testing.assert_close(first + second, whole, rtol=1e-4, atol=1e-6)
    signal = 4 * float(first.double() @ second.double())
    assert noise.signal == pytest.approx(signal, rel=1e-3)
    assert noise.noise == pytest.approx(6 * (float(whole.double() @ whole.double()) - signal), rel=1e-3)
    assert noise.num_groups == 6


def test_measuring_leaves_the_gradient(make_model: Callable[..., Any]) -> None:
    model, batch = make_model("llama"), rollouts(num_prompts=6, group=3)
    updater = updater_of(model, micro_rows=4)
    _, with_noise = measured(updater, batch)
    updater.update(updater.algorithm.compute_advantages(batch), torch.arange(18).unsqueeze(0))
    without = torch.cat([p.grad.reshape(-1) for p in updater.policy.parameters() if p.grad is not None])
    torch.testing.assert_close(with_noise, without, rtol=1e-5, atol=1e-7)


def test_groups_without_a_gradient_still_count(make_model: Callable[..., Any]) -> None:
    batch = rollouts(num_prompts=6, group=3)
    batch.reward_BT[batch.group_B % 2 == 1] = 0.0  # one half of the groups is uniform
    noise, whole = measured(updater_of(make_model("llama")), batch)
    assert noise is not None
    assert noise.signal == pytest.approx(0.0, abs=1e-9)
    assert noise.noise == pytest.approx(6 * float(whole.double() @ whole.double()), rel=1e-4)


def test_a_step_of_one_group_has_no_estimate(make_model: Callable[..., Any]) -> None:
    assert measured(updater_of(make_model("llama")), rollouts(num_prompts=1, group=4))[0] is None
