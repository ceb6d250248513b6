"""Faults to plant: each stood in a published trainer. A function here puts one in; `test_mutants` names its test."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from torch import Tensor

import llm_pg.algorithms.advantages as advantages
import llm_pg.algorithms.algorithm as core
import llm_pg.algorithms.loss as loss
import llm_pg.prove.world as world_module
from llm_pg.algorithms.algorithm import Algorithm, Batch
from llm_pg.algorithms.spec import AlgorithmSpec
from llm_pg.estimators import baselines, distributions, kl, masked, objectives, ratios, returns, surrogates
from llm_pg.rollouts import Rollouts

Patch = pytest.MonkeyPatch


def plant(patch: Patch, name: str, fault: object) -> None:
    """Puts a fault in the place of an estimator, wherever the algorithms use it."""
    users = [module for module in (core, advantages, loss) if hasattr(module, name)]
    assert users
    for module in users:
        patch.setattr(module, name, fault)


def eos_left_out(patch: Patch) -> None:
    weigh = Algorithm.compute_advantages

    def faulty(self: Algorithm, rollouts: Rollouts, **others: object) -> Batch:
        batch = weigh(self, rollouts, **others)  # type: ignore[arg-type]
        ends_BT = batch.mask_BT & ~torch.cat([batch.mask_BT[:, 1:], torch.zeros_like(batch.mask_BT[:, :1])], 1)
        return dataclasses.replace(batch, mask_BT=batch.mask_BT & ~ends_BT)

    patch.setattr(Algorithm, "compute_advantages", faulty)


def verdict_at_the_first_token(patch: Patch) -> None:
    def faulty(mask_BT: Tensor) -> Tensor:
        return mask_BT & (mask_BT.long().cumsum(1) == 1)

    patch.setattr("llm_pg.rollouts.is_last", faulty)


def temperature_not_trained(patch: Patch) -> None:
    warp = distributions.warp_logits
    patch.setattr(world_module, "warp_logits", lambda logits, **s: warp(logits, **{**s, "temperature": 1.0}))


def top_k_not_trained(patch: Patch) -> None:
    warp = distributions.warp_logits
    patch.setattr(world_module, "warp_logits", lambda logits, **s: warp(logits, **{**s, "top_k": 0}))


def denominator_of_the_micro_batch(patch: Patch) -> None:
    rows = Batch.rows

    def faulty(self: Batch, index: Tensor) -> Batch:
        part = rows(self, index)
        scale = self.mask_BT.sum() / part.mask_BT.sum().clamp(min=1)
        return dataclasses.replace(part, loss_scale_BT=part.loss_scale_BT * scale)

    patch.setattr(Batch, "rows", faulty)


def denominator_of_one_rank(patch: Patch) -> None:
    weigh = Algorithm.compute_advantages
    patch.setattr(Algorithm, "compute_advantages", lambda self, rollouts, **others: weigh(self, rollouts))


def no_epsilon_under_the_deviation(patch: Patch) -> None:
    plant(patch, "STD_EPS", 0.0)


def mean_of_equal_rewards_by_plain_sums(patch: Patch) -> None:
    patch.setattr(baselines, "origin_of_group", lambda x_B, group_B, valid_B: torch.zeros_like(x_B))


def deviation_with_divisor_n(patch: Patch) -> None:
    def faulty(x_B: Tensor, group_B: Tensor, valid_B: Tensor) -> Tensor:
        mean_B = baselines.group_mean(x_B, group_B, valid_B)
        square_B, num_B = baselines.group_sums((x_B - mean_B) ** 2, group_B, valid_B)
        return (square_B / num_B.clamp(min=1)).sqrt()

    plant(patch, "group_std", faulty)


def deviation_of_one_unguarded(patch: Patch) -> None:
    def faulty(x_B: Tensor, group_B: Tensor, valid_B: Tensor) -> Tensor:
        mean_B = baselines.group_mean(x_B, group_B, valid_B)
        square_B, num_B = baselines.group_sums((x_B - mean_B) ** 2, group_B, valid_B)
        return (square_B / (num_B - 1)).sqrt()

    plant(patch, "group_std", faulty)


def itself_in_the_leave_one_out_mean(patch: Patch) -> None:
    plant(patch, "leave_one_out", baselines.group_mean)


def groups_mixed(patch: Patch) -> None:
    for name in ("group_mean", "leave_one_out", "group_std"):
        right = getattr(baselines, name)
        plant(patch, name, lambda x, group_B, valid_B, f=right: f(x, torch.zeros_like(group_B), valid_B))


def every_weighs_alike_in_the_mean(patch: Patch) -> None:
    plant(patch, "length_weighted_mean", lambda x, length, group, valid: baselines.group_mean(x, group, valid))


def greedy_of_another_prompt(patch: Patch) -> None:
    patch.setitem(advantages.BASELINES, "greedy", lambda return_B, *_: return_B)


def best_of_k_without_its_factor(patch: Patch) -> None:
    plant(patch, "best_of_k", lambda x, group, valid, k: objectives.best_of_k(x, group, valid, k) / k)


def best_of_k_with_itself_among_the_others(patch: Patch) -> None:
    def faulty(x_B: Tensor, group_B: Tensor, valid_B: Tensor, k: int) -> Tensor:
        return objectives.best_of_k(x_B, group_B, valid_B, k) - x_B + baselines.group_mean(x_B, group_B, valid_B)

    plant(patch, "best_of_k", faulty)


def a_constant_under_the_mean(patch: Patch) -> None:
    def faulty(advantage_BT: Tensor, x_B: Tensor, group_B: Tensor, valid_B: Tensor) -> Tensor:
        return advantage_BT / (baselines.group_mean(x_B, group_B, valid_B) + 1e-4).unsqueeze(1)

    plant(patch, "over_the_mean", faulty)


def gate_of_the_wrong_sign(patch: Patch) -> None:
    right = surrogates.sapo
    plant(patch, "sapo", lambda ratio, weight, pos, neg: right(ratio, weight, neg, pos))
    patch.setattr(importlib.import_module("test_sampler_correction"), "sapo", lambda r, w, p, n: right(r, w, n, p))


def correction_of_the_present_policy(patch: Patch) -> None:
    """π_new/π_sampler in the place of π_old/π_sampler counts the update's own ratio twice."""
    right = ratios.sampler_correction
    plant(patch, "sampler_correction", lambda old, sampled, *more: right(sampled, old, *more))


def correction_of_the_token(patch: Patch) -> None:
    right = ratios.sampler_correction

    def faulty(old: Tensor, sampled: Tensor, mask: Tensor, mode: str, *more: float | None) -> tuple[Tensor, Tensor]:
        return right(old, sampled, mask, mode.replace("sequence", "token"), *more)

    plant(patch, "sampler_correction", faulty)


def successes_dropped_too(patch: Patch) -> None:
    right = ratios.has_left
    everyone = torch.ones(1, 1, dtype=torch.bool)
    plant(patch, "has_left", lambda *given: right(*given) | everyone)


def share_of_the_micro_batch(patch: Patch) -> None:
    right = masked.in_top_share
    plant(patch, "in_top_share", lambda x, mask, share, all_sum: right(x, mask, share))


def unscored_count_as_zero(patch: Patch) -> None:
    for name in ("group_mean", "leave_one_out", "group_std"):
        right = getattr(baselines, name)
        plant(patch, name, lambda x, group_B, valid_B, f=right: f(x, group_B, torch.ones_like(valid_B)))


def beta_ignored(patch: Patch) -> None:
    init = Algorithm.__init__

    def faulty(self: Algorithm, row: AlgorithmSpec, *others: object, **more: object) -> None:
        init(self, dataclasses.replace(row, beta=0.0), *others, **more)  # type: ignore[arg-type]

    patch.setattr(Algorithm, "__init__", faulty)


def penalty_of_the_wrong_sign(patch: Patch) -> None:
    wrong = {name: (lambda a, b, f=f: -f(a, b)) for name, f in kl.KL_ESTIMATORS.items()}
    plant(patch, "KL_ESTIMATORS", wrong)


def k1_means_reference_over_policy(patch: Patch) -> None:
    plant(patch, "KL_ESTIMATORS", {**kl.KL_ESTIMATORS, "k1": lambda a, b: b - a})


def k3_without_its_linear_term(patch: Patch) -> None:
    plant(patch, "KL_ESTIMATORS", {**kl.KL_ESTIMATORS, "k3": lambda a, b: torch.expm1(b - a)})


def truncation_policy_ignored(patch: Patch) -> None:
    init = Algorithm.__init__

    def faulty(self: Algorithm, row: AlgorithmSpec, *others: object, **more: object) -> None:
        init(self, dataclasses.replace(row, truncated="keep"), *others, **more)  # type: ignore[arg-type]

    patch.setattr(Algorithm, "__init__", faulty)


def statistics_over_padding(patch: Patch) -> None:
    plant(patch, "masked_sum", lambda x, mask, dim=None: x.sum() if dim is None else x.sum(dim))


def junk_through_the_gradient(patch: Patch) -> None:
    right = torch.Tensor.masked_fill
    patch.setattr(
        torch.Tensor, "masked_fill", lambda self, mask, value: self if value == 0.0 else right(self, mask, value)
    )


def behaviour_forgotten(patch: Patch) -> None:
    loss = Algorithm.loss

    def faulty(self: Algorithm, logp_BT: Tensor, batch: Batch, **others: object) -> tuple:
        return loss(self, logp_BT, dataclasses.replace(batch, proximal_logp_BT=None), **others)  # type: ignore[arg-type]

    patch.setattr(Algorithm, "loss", faulty)


def token_ratio_for_the_completions(patch: Patch) -> None:
    right = ratios.importance_ratio
    plant(patch, "importance_ratio", lambda logp, old, mask, level: right(logp, old, mask, "token"))


def pessimism_turned_round(patch: Patch) -> None:
    def faulty(
        ratio: Tensor, weight: Tensor, epsilon: float, high: float | None = None, delta: object = None
    ) -> Tensor:
        return -torch.maximum(ratio * weight, ratios.clip_range(ratio, epsilon, high) * weight)

    patch.setattr(importlib.import_module("test_surrogates"), "clipped", faulty)


def rewards_before_a_token_count(patch: Patch) -> None:
    def faulty(reward_BT: Tensor, discount_BT: Tensor, *others: object) -> Tensor:
        return reward_BT.cumsum(1)

    plant(patch, "reward_to_go", faulty)


def return_paid_across_an_end(patch: Patch) -> None:
    def faulty(reward_BT: Tensor, discount_BT: Tensor, *others: Tensor) -> Tensor:
        return returns.reward_to_go(reward_BT, torch.full_like(discount_BT, 0.5), *others)

    patch.setattr(importlib.import_module("test_returns"), "reward_to_go", faulty)


def bootstrap_at_a_cut_forgotten(patch: Patch) -> None:
    def faulty(reward_BT: Tensor, discount_BT: Tensor, *others: Tensor) -> Tensor:
        return returns.reward_to_go(reward_BT, discount_BT)

    patch.setattr(importlib.import_module("test_returns"), "reward_to_go", faulty)


def sum_over_tokens_made_a_mean(patch: Patch) -> None:
    patch.setitem(loss.REDUCTIONS, "sequence_sum", loss.REDUCTIONS["dapo"])


def baseline_updated_before_it_is_read(patch: Patch) -> None:
    def eager(x: Tensor, rollouts: Rollouts, running_mean: float, all_sum: baselines.AllSum) -> Tensor:
        return 0.9 * running_mean + 0.1 * baselines.batch_mean(x, rollouts.valid_B, all_sum).expand_as(x)

    patch.setitem(advantages.BASELINES, "running_mean", eager)


def weights_carry_a_gradient(patch: Patch) -> None:
    plant(patch, "group_mean", baselines.group_mean)
    patch.setattr(torch.Tensor, "detach", lambda self: self)


def sum_reads_the_padding(patch: Patch) -> None:
    def faulty(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
        kept = x * mask
        return kept.sum() if dim is None else kept.sum(dim)

    patch.setattr(importlib.import_module("test_surrogates"), "masked_sum", faulty)
