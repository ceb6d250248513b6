"""From scored rollouts to advantages: what each step is credited with, less a baseline, over a scale.

Each word of an `AlgorithmSpec` has its pure function here:

    CREDITS         (return_B, reward_BT, rollouts) -> (B, T)                       what each step is credited with
    BASELINES       (x, rollouts, running_mean, all_sum) -> as x, (B,) or (B, T)    what is subtracted from it
    SCALES          (advantage_BT, return_B, rollouts, all_sum) -> (B, T)           what it is divided by
    NORMALIZATIONS  (advantage_BT, mask_BT, all_sum) -> (B, T)                      mean 0 and deviation 1 over a unit

`all_sum` sums a tensor over ranks. The estimators themselves are in `llm_pg.estimators`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from ..estimators.baselines import (
    STD_EPS,
    AllSum,
    RunningMean,
    RunningMeans,
    batch_mean,
    batch_mean_and_std,
    batch_std,
    group_mean,
    group_std,
    leave_one_out,
    leave_one_out_std,
    length_weighted_mean,
    sum_of_normalised,
)
from ..estimators.critics import length_adaptive_lambda
from ..estimators.kl import KL_ESTIMATORS
from ..estimators.masked import masked_sum
from ..estimators.objectives import best_of_k, over_the_mean
from ..estimators.returns import gae, reward_to_go, total_return
from ..rollouts import Rollouts, is_last
from .spec import STEP_BASELINES, AlgorithmSpec

CREDITS: dict[str, Callable[[Tensor, Tensor, Rollouts], Tensor]] = {
    "total": lambda return_B, reward_BT, of: return_B.unsqueeze(1).expand_as(reward_BT),
    "reward_to_go": lambda _, reward_BT, of: reward_to_go(reward_BT, of.discount_BT, of.cut_BT, of.bootstrap_BT),
}


def _greedy(return_B: Tensor, rollouts: Rollouts, running_mean: float | Tensor, all_sum: AllSum) -> Tensor:
    if rollouts.greedy_B is None:
        raise ValueError("baseline 'greedy' needs the reward of each prompt's greedy completion, greedy_B.")
    return rollouts.greedy_B.to(return_B.dtype)


# `value` is not among them: its advantages are those of GAE.
BASELINES: dict[str, Callable[[Tensor, Rollouts, float | Tensor, AllSum], Tensor]] = {
    "none": lambda x, *_: torch.zeros_like(x),
    "running_mean": lambda x, of, running_mean, _: torch.zeros_like(x) + running_mean,
    "batch_mean": lambda x, of, _, all_sum: batch_mean(x, of.valid_B, all_sum).expand_as(x),
    "group_mean": lambda x, of, *_: group_mean(x, of.group_B, of.valid_B),
    "leave_one_out": lambda x, of, *_: leave_one_out(x, of.group_B, of.valid_B),
    "length_weighted": lambda x, of, *_: length_weighted_mean(x, of.length_B, of.group_B, of.valid_B),
    "greedy": _greedy,
}


def _over_the_others(advantage_BT: Tensor, return_B: Tensor, rollouts: Rollouts) -> Tensor:
    """Divided by the deviation of the others; by 1 where they are all equal and say nothing of a scale."""
    std_B = leave_one_out_std(return_B, rollouts.group_B, rollouts.valid_B)
    return advantage_BT / torch.where(std_B > 0, std_B, torch.ones_like(std_B)).unsqueeze(1)


SCALES: dict[str, Callable[[Tensor, Tensor, Rollouts, AllSum], Tensor]] = {
    "none": lambda a_BT, *_: a_BT,
    "group": lambda a_BT, r_B, of, _: a_BT / (group_std(r_B, of.group_B, of.valid_B) + STD_EPS).unsqueeze(1),
    "batch": lambda a_BT, r_B, of, all_sum: a_BT / (batch_std(r_B, of.valid_B, all_sum) + STD_EPS),
    "leave_one_out": lambda a_BT, r_B, of, _: _over_the_others(a_BT, r_B, of),
    "group_mean": lambda a_BT, r_B, of, _: over_the_mean(a_BT, r_B, of.group_B, of.valid_B),
}


def _over_steps(advantage_BT: Tensor, mask_BT: Tensor, all_sum: AllSum) -> Tensor:
    return _standard(advantage_BT, mask_BT, advantage_BT.reshape(-1), mask_BT.reshape(-1), all_sum)


def _over_rollouts(advantage_BT: Tensor, mask_BT: Tensor, all_sum: AllSum) -> Tensor:
    mean_B = masked_sum(advantage_BT, mask_BT, 1) / mask_BT.sum(1).clamp(min=1)
    return _standard(advantage_BT, mask_BT, mean_B, mask_BT.any(1), all_sum)


def _standard(advantage_BT: Tensor, mask_BT: Tensor, units: Tensor, counts: Tensor, all_sum: AllSum) -> Tensor:
    """Advantages less the mean of the units that count, over their deviation."""
    mean, std = batch_mean_and_std(units, counts, all_sum)
    normal_BT = (advantage_BT - mean) / (std + STD_EPS)
    return torch.where(mask_BT, normal_BT, torch.zeros_like(normal_BT))


NORMALIZATIONS: dict[str, Callable[[Tensor, Tensor, AllSum], Tensor]] = {
    "none": lambda advantage_BT, *_: advantage_BT,
    "steps": _over_steps,
    "rollouts": _over_rollouts,
}


def advantages_and_targets(
    spec: AlgorithmSpec,
    rollouts: Rollouts,
    running_mean: RunningMean,
    running_means: RunningMeans | None,
    all_sum: AllSum,
) -> tuple[Tensor, Tensor | None]:
    """Computes advantages (B, T) before the mask and the normalization, and the critic's targets (B, T) or None.

    Args:
        spec: the algorithm.
        rollouts: a scored batch.
        running_mean: of the returns of the batches before; moved by this one.
        running_means: the same for each role; None = the algorithm has no roles.
        all_sum: sums a tensor over ranks.
    """
    reward_BT = penalized_rewards(spec, rollouts)
    if spec.needs_critic:
        return _critic_advantages(spec, rollouts, reward_BT)
    if spec.advantage is not None:
        return _users_advantages(spec, rollouts, reward_BT), None
    return_B = total_return(reward_BT, rollouts.discount_BT)
    if spec.multi_objective_aggregation == "normalize_then_sum":
        return_B = _sum_of_normalized(return_B, rollouts)
    if spec.pass_k:
        weight_B = best_of_k(return_B, rollouts.group_B, rollouts.valid_B, spec.pass_k)
        return weight_B.unsqueeze(1).expand_as(reward_BT), None
    credit_BT = CREDITS[spec.returns](return_B, reward_BT, rollouts)
    if spec.baseline_per_step:
        advantage_BT = credit_BT - _baseline(spec, credit_BT, rollouts, running_mean, running_means, all_sum)
    else:
        advantage_BT = credit_BT - _baseline(spec, return_B, rollouts, running_mean, running_means, all_sum).unsqueeze(
            1
        )
    return SCALES[spec.scale_rewards](advantage_BT, return_B, rollouts, all_sum), None


def _baseline(
    spec: AlgorithmSpec,
    return_B: Tensor,
    rollouts: Rollouts,
    running_mean: RunningMean,
    running_means: RunningMeans | None,
    all_sum: AllSum,
) -> Tensor:
    if running_means is not None:
        return _baseline_of_roles(spec, running_means, return_B, rollouts, all_sum)
    baseline_B = BASELINES[spec.baseline](return_B, rollouts, running_mean.value, all_sum)
    if spec.baseline == "running_mean":  # of the batches before this one
        mean = batch_mean(return_B, rollouts.valid_B, all_sum)
        running_mean.update(mean, all_sum(rollouts.valid_B.sum().to(mean.dtype)))
    return baseline_B


def _baseline_of_roles(
    spec: AlgorithmSpec, means: RunningMeans, return_B: Tensor, rollouts: Rollouts, all_sum: AllSum
) -> Tensor:
    if rollouts.role_B is None:
        raise ValueError(
            f"baseline_column is {spec.baseline_column!r}, so the rollouts must carry role_B: the number of "
            "each row's role, `RunningMeans.role_of` what the column holds."
        )
    known_B = means.value_B(rollouts.role_B).to(return_B.dtype)
    baseline_B = BASELINES[spec.baseline](return_B, rollouts, known_B, all_sum)
    means.update(return_B, rollouts.role_B, rollouts.valid_B, all_sum)
    return baseline_B


def teacher_advantages(spec: AlgorithmSpec, rollouts: Rollouts, all_sum: AllSum) -> Tensor:
    """What the teacher says of each token and of those that follow, against the same of the group's others.

    With teacher_discount 1 the expected update is the gradient of -KL(policy || teacher) of whole completions.
    """
    assert rollouts.teacher_logp_BT is not None
    mask_BT = rollouts.mask_BT
    gain_BT = -KL_ESTIMATORS["k1"](rollouts.logp_BT, rollouts.teacher_logp_BT)
    gain_BT = torch.where(mask_BT, gain_BT, torch.zeros_like(gain_BT))
    if not spec.teacher_discount:
        return gain_BT
    to_go_BT = reward_to_go(gain_BT, spec.teacher_discount * rollouts.discount_BT, rollouts.cut_BT, None)
    if spec.baseline not in STEP_BASELINES:
        return to_go_BT
    return to_go_BT - BASELINES[spec.baseline](to_go_BT, rollouts, 0.0, all_sum)


def _sum_of_normalized(return_B: Tensor, rollouts: Rollouts) -> Tensor:
    part_B, weight_B = rollouts.part_reward_B, rollouts.part_weight_B
    if part_B is None or weight_B is None:  # one function alone
        part_B, weight_B = return_B.unsqueeze(1), torch.ones_like(return_B).unsqueeze(1)
    return sum_of_normalised(part_B.to(return_B.dtype), weight_B, rollouts.group_B, rollouts.valid_B)


def _users_advantages(spec: AlgorithmSpec, rollouts: Rollouts, reward_BT: Tensor) -> Tensor:
    """What the user's function makes of the rollouts, whose rewards are those after fines and KL."""
    assert spec.advantage is not None
    seen = copy.copy(rollouts)
    seen.reward_BT = reward_BT
    weight = spec.advantage(seen)
    shape = tuple(reward_BT.shape)
    if not isinstance(weight, Tensor) or tuple(weight.shape) not in (shape[:1], shape):
        got = f"shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else f"a {type(weight).__name__}"
        raise ValueError(
            f"The advantage function of algorithm {spec.name} returned {got} for {shape[0]} rollouts of "
            f"{shape[1]} steps; it must return a tensor ({shape[0]},), one weight a rollout, or {shape}, one a "
            "step."
        )
    advantage_BT = weight.unsqueeze(1) if weight.dim() == 1 else weight
    return advantage_BT.to(reward_BT.dtype).expand_as(reward_BT)


def _critic_advantages(spec: AlgorithmSpec, rollouts: Rollouts, reward_BT: Tensor) -> tuple[Tensor, Tensor]:
    if rollouts.value_BT is None:
        raise ValueError("baseline 'value' needs a critic: the rollouts carry no value_BT.")
    bootstrap_BT = torch.zeros_like(reward_BT) if rollouts.bootstrap_BT is None else rollouts.bootstrap_BT
    lam = spec.lam
    policy_lam: float | Tensor = lam
    if spec.lam_length_alpha is not None:
        policy_lam = length_adaptive_lambda(rollouts.length_B, spec.lam_length_alpha).to(reward_BT.dtype)
    value_lam = lam if spec.lam_value is None else spec.lam_value
    along = (reward_BT, rollouts.value_BT, rollouts.discount_BT, rollouts.cut_BT, bootstrap_BT)
    advantage_BT = gae(*along, policy_lam)
    same = spec.lam_length_alpha is None and value_lam == lam
    target_BT = rollouts.value_BT + (advantage_BT if same else gae(*along, value_lam))
    return advantage_BT, target_BT.detach()


def penalized_rewards(spec: AlgorithmSpec, rollouts: Rollouts) -> Tensor:
    """Returns rewards (B, T) less the fine for a truncated completion and, where it is placed there, the KL penalty.

    Args:
        spec: the algorithm.
        rollouts: a scored batch.
    """
    reward_BT = spec.reward_coef * rollouts.reward_BT
    if spec.truncated == "penalize":
        late_BT = is_last(rollouts.mask_BT) & rollouts.truncated_B.unsqueeze(1)
        reward_BT = reward_BT - spec.truncation_penalty * late_BT.to(reward_BT.dtype)
    if spec.beta and spec.kl_placement == "reward":
        assert rollouts.ref_logp_BT is not None
        kl_BT = KL_ESTIMATORS[spec.kl_estimator](rollouts.logp_BT, rollouts.ref_logp_BT)
        reward_BT = reward_BT - spec.beta * torch.where(rollouts.mask_BT, kl_BT, torch.zeros_like(kl_BT))
    return reward_BT
