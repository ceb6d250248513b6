"""What the words of an `AlgorithmSpec` mean: for each kind of word a table of pure functions with one signature.

    CREDITS         (return_B, reward_BT, rollouts) -> (B, T)                       what each step is credited with
    BASELINES       (x, rollouts, running_mean, all_sum) -> as x, (B,) or (B, T)    what is subtracted from it
    SCALES          (advantage_BT, return_B, rollouts, all_sum) -> (B, T)           what it is divided by
    NORMALIZATIONS  (advantage_BT, mask_BT, all_sum) -> (B, T)                      mean 0 and deviation 1 over a unit
    SURROGATES      (spec, logp_BT, ratio_BT, batch) -> (B, T)                      each step's term of the loss
    CLIPPED         (spec, logp_BT, ratio_BT, advantage_BT) -> bool (B, T)          steps that clipping meets
    REDUCTIONS      (mask_BT, num_rows, num_tokens, longest) -> (B, T)              what each term is multiplied by

`all_sum` sums a tensor over ranks. The estimators themselves are in `llm_pg.estimators`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..estimators.baselines import (
    STD_EPS,
    AllSum,
    batch_mean,
    batch_mean_and_std,
    batch_std,
    group_mean,
    group_std,
    leave_one_out,
    leave_one_out_std,
    length_weighted_mean,
)
from ..estimators.losses import cispo, clipped, gmpo, outside_divergence, reinforce, sapo, vespo
from ..estimators.masked import masked_sum
from ..estimators.objectives import over_the_mean
from ..estimators.returns import reward_to_go
from ..rollouts import Rollouts
from .batch import Batch
from .table import AlgorithmSpec

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


def _of_all_tokens(mask_BT: Tensor, num_rows: Tensor, num_tokens: Tensor, longest: int | None) -> Tensor:
    return mask_BT / num_tokens


def _of_a_constant(mask_BT: Tensor, num_rows: Tensor, num_tokens: Tensor, longest: int | None) -> Tensor:
    assert longest is not None
    return mask_BT / (num_rows * longest)


REDUCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, int | None], Tensor]] = {
    "sequence_sum": lambda mask_BT, num_rows, *_: mask_BT / num_rows,
    "grpo": lambda mask_BT, num_rows, *_: mask_BT / (mask_BT.sum(1, keepdim=True).clamp(min=1) * num_rows),
    "dapo": _of_all_tokens,
    "bnpo": _of_all_tokens,
    "dr_grpo": _of_a_constant,
}


def _clip(spec: AlgorithmSpec, logp_BT: Tensor, ratio_BT: Tensor, batch: Batch) -> Tensor:
    term_BT = clipped(ratio_BT, batch.advantage_BT, spec.epsilon, spec.epsilon_high, spec.delta)
    if spec.importance_sampling_level == "sequence_sum":
        # The ratio is the row's: its value counts once a row, not once a token. The gradient is that of each token.
        term_BT = term_BT - term_BT.detach() * (1 - 1 / batch.mask_BT.sum(1, keepdim=True).clamp(min=1))
    return term_BT


def _cispo(spec: AlgorithmSpec, logp_BT: Tensor, ratio_BT: Tensor, batch: Batch) -> Tensor:
    assert spec.epsilon_high is not None
    return cispo(ratio_BT, logp_BT, batch.advantage_BT, spec.epsilon_high)


def _gmpo(spec: AlgorithmSpec, logp_BT: Tensor, ratio_BT: Tensor, batch: Batch) -> Tensor:
    return gmpo(ratio_BT, batch.mask_BT, batch.advantage_BT, spec.epsilon, _high(spec))


def _dppo(spec: AlgorithmSpec, logp_BT: Tensor, ratio_BT: Tensor, batch: Batch) -> Tensor:
    term_BT = -ratio_BT * batch.advantage_BT
    return term_BT.masked_fill(_has_diverged(spec, logp_BT, ratio_BT, batch.advantage_BT), 0.0)


def _has_diverged(spec: AlgorithmSpec, logp_BT: Tensor, ratio_BT: Tensor, advantage_BT: Tensor) -> Tensor:
    return outside_divergence(logp_BT, ratio_BT, advantage_BT, spec.divergence_type, spec.epsilon, _high(spec))


def _high(spec: AlgorithmSpec) -> float:
    return spec.epsilon if spec.epsilon_high is None else spec.epsilon_high


SURROGATES: dict[str, Callable[[AlgorithmSpec, Tensor, Tensor, Batch], Tensor]] = {
    "reinforce": lambda spec, logp_BT, _, batch: reinforce(logp_BT, batch.advantage_BT),
    "clip": _clip,
    "cispo": _cispo,
    "sapo": lambda spec, _, ratio_BT, batch: sapo(
        ratio_BT, batch.advantage_BT, spec.sapo_temperature_pos, spec.sapo_temperature_neg
    ),
    "gmpo": _gmpo,
    "dppo": _dppo,
    "vespo": lambda spec, logp_BT, ratio_BT, batch: vespo(
        ratio_BT,
        logp_BT,
        batch.advantage_BT,
        (spec.vespo_k_pos, spec.vespo_k_neg),
        (spec.vespo_lambda_pos, spec.vespo_lambda_neg),
    ),
}


def _outside(spec: AlgorithmSpec, _: Tensor, ratio_BT: Tensor, advantage_BT: Tensor) -> Tensor:
    return ((ratio_BT > 1 + _high(spec)) & (advantage_BT > 0)) | ((ratio_BT < 1 - spec.epsilon) & (advantage_BT < 0))


def _outside_in_logs(spec: AlgorithmSpec, _: Tensor, ratio_BT: Tensor, advantage_BT: Tensor) -> Tensor:
    log_BT = ratio_BT.log()
    return ((log_BT > _high(spec)) & (advantage_BT > 0)) | ((log_BT < -spec.epsilon) & (advantage_BT < 0))


# Of reinforce: the steps that clipping would meet.
CLIPPED: dict[str, Callable[[AlgorithmSpec, Tensor, Tensor, Tensor], Tensor]] = {
    "reinforce": _outside,
    "clip": _outside,
    "cispo": lambda spec, _, ratio_BT, advantage_BT: ratio_BT > _high(spec),
    "gmpo": _outside_in_logs,
    "dppo": _has_diverged,
    "sapo": lambda spec, _, ratio_BT, advantage_BT: torch.zeros_like(ratio_BT, dtype=torch.bool),
    "vespo": lambda spec, _, ratio_BT, advantage_BT: torch.zeros_like(ratio_BT, dtype=torch.bool),
}
