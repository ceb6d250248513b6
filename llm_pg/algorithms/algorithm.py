"""From scored rollouts to per-token weights, and from log-probabilities to a sum that is a loss.

`weigh` folds the whole reduction into `scale_BT`, whose denominator belongs to the whole batch on all ranks. So `loss`
over any cut of the batch is a plain sum, and the gradients of the cuts add up to that of the batch.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..estimators.baselines import (
    STD_EPS,
    AllSum,
    RunningMean,
    batch_mean,
    batch_std,
    group_mean,
    group_std,
    leave_one_out,
    length_weighted_mean,
)
from ..estimators.critics import explained_variance, length_adaptive_lambda
from ..estimators.kl import KL_ESTIMATORS, AdaptivePenalty
from ..estimators.losses import cispo, clipped, reinforce, sapo, value_loss
from ..estimators.masked import in_top_share, masked_sum
from ..estimators.objectives import best_of_k, over_the_mean
from ..estimators.ratios import has_left, importance_ratio, sampler_correction
from ..estimators.returns import gae, reward_to_go, total_return
from ..rollouts import Rollouts, is_last
from .batch import Batch
from .own import find_row
from .table import Row

__all__ = ["Algorithm", "Batch"]


def _identity(x: Tensor) -> Tensor:
    return x


class Algorithm:
    """A row of the table at work. It holds no tensor; its state is the running mean of the returns and, with a
    `kl_target`, the weight of the penalty that keeps to it.

    Args:
        algorithm: a name of the table, `file.py:function` or `module:function`, or a `Row`.
        max_completion_length: the constant of the `dr_grpo` reduction, in tokens.
        changes: fields of the row that differ, such as beta=0.001, or advantage=a function of one's own.

    Raises:
        ValueError: an unknown name, field or word, with the nearest that is known.
    """

    def __init__(
        self, algorithm: str | Row = "reinforce", max_completion_length: int | None = None, **changes: Any
    ) -> None:
        row = find_row(algorithm, changes)
        if row.loss_type == "dr_grpo" and not max_completion_length:
            raise ValueError("loss_type dr_grpo divides by max_completion_length; give it to Algorithm (> 0).")
        self.row = row
        self.max_completion_length = max_completion_length
        self.running_mean = RunningMean(row.baseline_decay)
        self.kl_penalty = AdaptivePenalty(row.kl_target) if row.kl_target else None

    def check_rewards(self, rollouts: Rollouts) -> None:
        """Raise ValueError where rewards are such that this row's weights would mean nothing."""
        if self.row.scale_rewards == "group_mean":
            least = float(total_return(rollouts.reward_BT, rollouts.discount_BT).min())
            if least < 0:
                raise ValueError(
                    f"A completion has the reward {least:g}, and {self.row.name} divides by the mean reward of a "
                    "group, which must not fall below 0. Use rewards of 0 and 1, or algorithm rloo."
                )

    # --- from rollouts to weights

    def weigh(self, rollouts: Rollouts, *, progress: float = 0.0, all_sum: AllSum = _identity) -> Batch:
        """Weights and scales of a scored batch.

        Args:
            rollouts: scored rollouts; `ref_logp_BT` where beta > 0, `value_BT` where the baseline is a critic.
            progress: share of the run that is over, 0..1, for the entropy schedule.
            all_sum: sums a tensor over ranks.
        """
        row = self.row
        if row.beta and rollouts.ref_logp_BT is None:
            raise ValueError(f"beta is {row.beta}, so the rollouts must carry ref_logp_BT.")
        mask_BT = rollouts.mask_BT & rollouts.valid_B.unsqueeze(1)
        if row.truncated == "mask":
            mask_BT = mask_BT & ~rollouts.truncated_B.unsqueeze(1)
        weight_BT, target_BT = self._advantages(rollouts, self._rewards(rollouts), all_sum)
        weight_BT = self._normalise(torch.where(mask_BT, weight_BT, torch.zeros_like(weight_BT)), mask_BT, all_sum)
        bonus_BT = None
        if row.top_entropy_quantile < 1:
            if rollouts.entropy_BT is None:
                raise ValueError(f"top_entropy_quantile is {row.top_entropy_quantile}: rollouts must carry entropy_BT.")
            high_BT = in_top_share(rollouts.entropy_BT, mask_BT, row.top_entropy_quantile, all_sum)
            weight_BT = torch.where(high_BT, weight_BT, torch.zeros_like(weight_BT))
            bonus_BT = high_BT.to(weight_BT.dtype)
            bonus_BT = bonus_BT / all_sum(bonus_BT.sum()).clamp(min=1)
        counts = all_sum(torch.stack([rollouts.valid_B.sum(), mask_BT.sum()]).to(weight_BT.dtype))
        num_rows, num_tokens = counts.clamp(min=1).unbind()
        final = row.entropy_coef if row.entropy_coef_final is None else row.entropy_coef_final
        return Batch(
            rollouts=rollouts,
            mask_BT=mask_BT,
            weight_BT=weight_BT.detach(),
            scale_BT=self._scale(mask_BT.to(weight_BT.dtype), num_rows, num_tokens),
            num_tokens=num_tokens,
            entropy_coef=row.entropy_coef + (final - row.entropy_coef) * min(max(progress, 0.0), 1.0),
            ref_logp_BT=rollouts.ref_logp_BT if row.beta and row.kl_placement == "loss" else None,
            bonus_BT=bonus_BT,
            value_target_BT=target_BT,
            old_value_BT=rollouts.value_BT if target_BT is not None else None,
        )

    def _rewards(self, rollouts: Rollouts) -> Tensor:
        row, reward_BT = self.row, rollouts.reward_BT
        if row.truncated == "penalise":
            late_BT = is_last(rollouts.mask_BT) & rollouts.truncated_B.unsqueeze(1)
            reward_BT = reward_BT - row.truncation_penalty * late_BT.to(reward_BT.dtype)
        if row.beta and row.kl_placement == "reward":
            assert rollouts.ref_logp_BT is not None
            kl_BT = KL_ESTIMATORS[row.kl_estimator](rollouts.logp_BT, rollouts.ref_logp_BT)
            reward_BT = reward_BT - row.beta * torch.where(rollouts.mask_BT, kl_BT, torch.zeros_like(kl_BT))
        return reward_BT

    def _advantages(self, rollouts: Rollouts, reward_BT: Tensor, all_sum: AllSum) -> tuple[Tensor, Tensor | None]:
        row = self.row
        if row.needs_critic:
            return self._critic_advantages(rollouts, reward_BT)
        if row.advantage is not None:
            return self._own_advantages(rollouts, reward_BT), None
        return_B = total_return(reward_BT, rollouts.discount_BT)
        if row.pass_k:
            weight_B = best_of_k(return_B, rollouts.group_B, rollouts.valid_B, row.pass_k)
            return weight_B.unsqueeze(1).expand_as(reward_BT), None
        credit_BT = _CREDITS[row.returns](return_B, reward_BT, rollouts)
        if row.baseline_per_step:
            weight_BT = credit_BT - self._baseline(credit_BT, rollouts, all_sum)
        else:
            weight_BT = credit_BT - self._baseline(return_B, rollouts, all_sum).unsqueeze(1)
        return _SCALES[row.scale_rewards](weight_BT, return_B, rollouts, all_sum), None

    def _own_advantages(self, rollouts: Rollouts, reward_BT: Tensor) -> Tensor:
        """What the user's function makes of the rollouts, whose rewards are those after fines and KL."""
        assert self.row.advantage is not None
        seen = copy.copy(rollouts)
        seen.reward_BT = reward_BT
        weight = self.row.advantage(seen)
        shape = tuple(reward_BT.shape)
        if not isinstance(weight, Tensor) or tuple(weight.shape) not in (shape[:1], shape):
            got = f"shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else f"a {type(weight).__name__}"
            raise ValueError(
                f"The advantage function of algorithm {self.row.name} returned {got} for {shape[0]} rollouts of "
                f"{shape[1]} steps; it must return a tensor ({shape[0]},), one weight a rollout, or {shape}, one a "
                "step."
            )
        weight_BT = weight.unsqueeze(1) if weight.dim() == 1 else weight
        return weight_BT.to(reward_BT.dtype).expand_as(reward_BT)

    def _critic_advantages(self, rollouts: Rollouts, reward_BT: Tensor) -> tuple[Tensor, Tensor]:
        if rollouts.value_BT is None:
            raise ValueError("baseline 'value' needs a critic: the rollouts carry no value_BT.")
        bootstrap_BT = torch.zeros_like(reward_BT) if rollouts.bootstrap_BT is None else rollouts.bootstrap_BT
        row, lam = self.row, self.row.lam
        policy_lam: float | Tensor = lam
        if row.lam_length_alpha is not None:
            policy_lam = length_adaptive_lambda(rollouts.length_B, row.lam_length_alpha).to(reward_BT.dtype)
        value_lam = lam if row.lam_value is None else row.lam_value
        along = (reward_BT, rollouts.value_BT, rollouts.discount_BT, rollouts.cut_BT, bootstrap_BT)
        advantage_BT = gae(*along, policy_lam)
        same = row.lam_length_alpha is None and value_lam == lam
        target_BT = rollouts.value_BT + (advantage_BT if same else gae(*along, value_lam))
        return advantage_BT, target_BT.detach()

    def foretold(self, rollouts: Rollouts, mask_BT: Tensor, all_sum: AllSum = _identity) -> float | None:
        """Explained variance of the rewards-to-go (penalties in the reward included) by `value_BT`; see `critics`."""
        assert rollouts.value_BT is not None
        return_BT = reward_to_go(self._rewards(rollouts), rollouts.discount_BT, rollouts.cut_BT, rollouts.bootstrap_BT)
        return explained_variance(rollouts.value_BT, return_BT, mask_BT, all_sum)

    def _baseline(self, return_B: Tensor, rollouts: Rollouts, all_sum: AllSum) -> Tensor:
        return _BASELINES[self.row.baseline](return_B, rollouts, self.running_mean, all_sum)

    def _normalise(self, weight_BT: Tensor, mask_BT: Tensor, all_sum: AllSum) -> Tensor:
        units = _NORMALIZED[self.row.normalize_advantages]
        if units is None:
            return weight_BT
        x, kept = units(weight_BT, mask_BT)
        normal_BT = (weight_BT - batch_mean(x, kept, all_sum)) / (batch_std(x, kept, all_sum) + STD_EPS)
        return torch.where(mask_BT, normal_BT, torch.zeros_like(normal_BT))

    def _scale(self, mask_BT: Tensor, num_rows: Tensor, num_tokens: Tensor) -> Tensor:
        return _REDUCTIONS[self.row.loss_type](mask_BT, num_rows, num_tokens, self.max_completion_length)

    # --- from log-probabilities to the loss

    def loss(
        self,
        logp_BT: Tensor,
        batch: Batch,
        *,
        entropy_BT: Tensor | None = None,
        value_BT: Tensor | None = None,
        measure: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over these rows, and sums for the metrics (each adds up over cuts).

        Args:
            logp_BT: log π of the sampled actions under the policy in training, with its gradient.
            batch: the same rows of what `weigh` returned.
            entropy_BT: token entropies in nats, needed where entropy_coef is not 0.
            value_BT: the critic's present values, needed where the batch has value targets.
            measure: False leaves out the statistics of the ratios, which cost as much as the loss of a small batch.
        """
        row, mask_BT = self.row, batch.mask_BT
        # Junk outside the mask would come back through the gradient of exp, as 0 · inf, though no sum reads it.
        outside_BT = ~mask_BT
        logp_BT = logp_BT.masked_fill(outside_BT, 0.0)
        old_BT = logp_BT.detach() if batch.old_logp_BT is None else batch.old_logp_BT.masked_fill(outside_BT, 0.0)
        ratio_BT = importance_ratio(logp_BT, old_BT, mask_BT, row.importance_sampling_level)
        own_loss = self._own_loss(logp_BT, old_BT, batch)
        term_BT = self._surrogate(logp_BT, ratio_BT, batch) if own_loss is None else torch.zeros_like(logp_BT)
        stats = self._ratio_stats(logp_BT, old_BT, ratio_BT, batch) if measure else {}
        term_BT, cut_stats = self._corrected(term_BT, logp_BT, old_BT, batch)
        stats.update(cut_stats)
        if batch.ref_logp_BT is not None:
            kl_BT = KL_ESTIMATORS[row.kl_estimator](logp_BT, batch.ref_logp_BT.masked_fill(outside_BT, 0.0))
            if row.use_bias_correction_kl:
                kl_BT = kl_BT * ratio_BT
            term_BT = term_BT + row.beta * kl_BT
        if self.kl_penalty is not None:
            # The steps were sampled by the old policy, so k3 with the old one first is an exact KL(old || new).
            term_BT = term_BT + self.kl_penalty.weight * KL_ESTIMATORS["k3"](old_BT, logp_BT)
        loss = masked_sum(term_BT * batch.scale_BT, mask_BT)
        if own_loss is not None:
            loss = loss + own_loss
        stats["policy_loss"] = loss.detach()
        if entropy_BT is not None:
            entropy = masked_sum(entropy_BT, mask_BT)
            stats["entropy"] = entropy.detach() / batch.num_tokens
            if batch.entropy_coef:
                every, kept_BT = entropy / batch.num_tokens, batch.bonus_BT
                bonus = every if kept_BT is None else masked_sum(entropy_BT * kept_BT, mask_BT)
                loss = loss - batch.entropy_coef * bonus
        if batch.value_target_BT is not None and value_BT is not None:
            error_BT = value_loss(value_BT, batch.value_target_BT, batch.old_value_BT, row.value_clip)
            value_term = masked_sum(error_BT, mask_BT) / batch.num_tokens
            stats["value_loss"] = value_term.detach()
            loss = loss + row.vf_coef * value_term
        return loss, stats

    def _own_loss(self, logp_BT: Tensor, old_BT: Tensor, batch: Batch) -> Tensor | None:
        """What the user's function makes of these rows; None where there is none."""
        if self.row.loss is None:
            return None
        loss = self.row.loss(logp_BT, dataclasses.replace(batch, old_logp_BT=old_BT))
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(
                f"The loss function of algorithm {self.row.name} returned {got}; it must return a scalar, the sum over "
                "its rows of terms times batch.scale_BT. `llm-pg prove --loss FILE:FUNCTION` tries it."
            )
        return loss

    def _surrogate(self, logp_BT: Tensor, ratio_BT: Tensor, batch: Batch) -> Tensor:
        return _SURROGATES[self.row.surrogate](self.row, logp_BT, ratio_BT, batch)

    def _corrected(
        self, term_BT: Tensor, logp_BT: Tensor, old_BT: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy term less what the sampler is to blame for, and the shares of tokens that this met."""
        row, mask_BT, stats = self.row, batch.mask_BT, {}
        sampled_BT = batch.rollouts.logp_BT.masked_fill(~mask_BT, 0.0)
        if row.off_policy_mask_threshold is not None:
            left_B1 = has_left(logp_BT, sampled_BT, mask_BT, row.off_policy_mask_threshold)
            dropped_BT = left_B1 & (batch.weight_BT < 0)
            term_BT = term_BT.masked_fill(dropped_BT, 0.0)
            stats["off_policy_masked"] = masked_sum(dropped_BT.to(term_BT.dtype), mask_BT) / batch.num_tokens
        if row.vllm_importance_sampling_correction:
            correction_BT, bounded_BT = sampler_correction(
                old_BT,
                sampled_BT,
                mask_BT,
                row.vllm_importance_sampling_mode,
                row.vllm_importance_sampling_clip_min,
                row.vllm_importance_sampling_clip_max,
            )
            term_BT = term_BT * correction_BT
            stats["correction_bounded"] = masked_sum(bounded_BT.to(term_BT.dtype), mask_BT) / batch.num_tokens
        return term_BT, stats

    @torch.no_grad()
    def _ratio_stats(self, logp_BT: Tensor, old_BT: Tensor, ratio_BT: Tensor, batch: Batch) -> dict[str, Tensor]:
        row, n = self.row, batch.num_tokens
        held_BT = _HELD[row.surrogate](row, ratio_BT, batch.weight_BT)
        sampled_BT = batch.rollouts.logp_BT
        return {
            "clip_fraction": masked_sum(held_BT.to(logp_BT.dtype), batch.mask_BT) / n,
            "approx_kl": masked_sum(torch.expm1(logp_BT - old_BT) - (logp_BT - old_BT), batch.mask_BT) / n,
            "sampler_gap": masked_sum((old_BT - sampled_BT).abs(), batch.mask_BT) / n,
        }

    def observe_kl(self, kl: float) -> None:
        """After an update: the KL(old || new) it came to, in nats a step (`approx_kl`), moves the adaptive penalty."""
        if self.kl_penalty is not None:
            self.kl_penalty.update(kl)

    def contributes_B(self, batch: Batch) -> Tensor:
        """True for rows whose gradient can differ from 0; the others need no forward pass.

        A row of weight 0 still counts where a KL stands in the loss, with an entropy bonus, or with a critic.
        """
        kl = batch.ref_logp_BT is not None or self.kl_penalty is not None
        anyway = kl or batch.entropy_coef or batch.value_target_BT is not None
        return batch.mask_BT.any(1) if anyway else ((batch.weight_BT != 0) & batch.mask_BT).any(1)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"running_mean": self.running_mean.state_dict()}
        if self.kl_penalty is not None:
            state["kl_penalty"] = self.kl_penalty.weight
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.running_mean.load_state_dict(state["running_mean"])
        if self.kl_penalty is not None and "kl_penalty" in state:  # else of a run without, gone on from all the same
            self.kl_penalty.weight = float(state["kl_penalty"])


# What the words of a row mean: a function of one signature for each. A planted word fails where its `Row` is made.


def _greedy(return_B: Tensor, rollouts: Rollouts, running_mean: RunningMean, all_sum: AllSum) -> Tensor:
    if rollouts.greedy_B is None:
        raise ValueError("baseline 'greedy' needs the reward of each prompt's greedy completion, greedy_B.")
    return rollouts.greedy_B.to(return_B.dtype)


def _running(return_B: Tensor, rollouts: Rollouts, running_mean: RunningMean, all_sum: AllSum) -> Tensor:
    mean = batch_mean(return_B, rollouts.valid_B, all_sum)
    before = running_mean.value
    running_mean.update(mean, all_sum(rollouts.valid_B.sum().to(mean.dtype)))
    return torch.full_like(return_B, before)


# `value` is not among them: its advantages are those of GAE.
_BASELINES: dict[str, Callable[[Tensor, Rollouts, RunningMean, AllSum], Tensor]] = {
    "none": lambda return_B, *_: torch.zeros_like(return_B),
    "running_mean": _running,
    "batch_mean": lambda r_B, of, _, all_sum: batch_mean(r_B, of.valid_B, all_sum).expand_as(r_B),
    "group_mean": lambda r_B, of, *_: group_mean(r_B, of.group_B, of.valid_B),
    "leave_one_out": lambda r_B, of, *_: leave_one_out(r_B, of.group_B, of.valid_B),
    "length_weighted": lambda r_B, of, *_: length_weighted_mean(r_B, of.length_B, of.group_B, of.valid_B),
    "greedy": _greedy,
}
_CREDITS: dict[str, Callable[[Tensor, Tensor, Rollouts], Tensor]] = {
    "total": lambda return_B, reward_BT, of: return_B.unsqueeze(1).expand_as(reward_BT),
    "reward_to_go": lambda _, reward_BT, of: reward_to_go(reward_BT, of.discount_BT, of.cut_BT, of.bootstrap_BT),
}
_SCALES: dict[str, Callable[[Tensor, Tensor, Rollouts, AllSum], Tensor]] = {
    "none": lambda w_BT, *_: w_BT,
    "group": lambda w_BT, r_B, of, _: w_BT / (group_std(r_B, of.group_B, of.valid_B) + STD_EPS).unsqueeze(1),
    "batch": lambda w_BT, r_B, of, all_sum: w_BT / (batch_std(r_B, of.valid_B, all_sum) + STD_EPS),
    "group_mean": lambda w_BT, r_B, of, _: over_the_mean(w_BT, r_B, of.group_B, of.valid_B),
}
# The numbers that get mean 0 and deviation 1, and which of them count.
_NORMALIZED: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None] = {
    "none": None,
    "steps": lambda w_BT, mask_BT: (w_BT.reshape(-1), mask_BT.reshape(-1)),
    "rollouts": lambda w_BT, mask_BT: (
        masked_sum(w_BT, mask_BT, 1) / mask_BT.sum(1).clamp(min=1),
        mask_BT.any(1),
    ),
}


def _of_all_tokens(mask_BT: Tensor, num_rows: Tensor, num_tokens: Tensor, longest: int | None) -> Tensor:
    return mask_BT / num_tokens


def _of_a_constant(mask_BT: Tensor, num_rows: Tensor, num_tokens: Tensor, longest: int | None) -> Tensor:
    assert longest is not None
    return mask_BT / (num_rows * longest)


_REDUCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, int | None], Tensor]] = {
    "sequence_sum": lambda mask_BT, num_rows, *_: mask_BT / num_rows,
    "grpo": lambda mask_BT, num_rows, *_: mask_BT / (mask_BT.sum(1, keepdim=True).clamp(min=1) * num_rows),
    "dapo": _of_all_tokens,
    "bnpo": _of_all_tokens,
    "dr_grpo": _of_a_constant,
}


def _clip(row: Row, logp_BT: Tensor, ratio_BT: Tensor, batch: Batch) -> Tensor:
    term_BT = clipped(ratio_BT, batch.weight_BT, row.epsilon, row.epsilon_high, row.delta)
    if row.importance_sampling_level == "sequence_sum":
        # The ratio is the row's: its value counts once a row, not once a token. The gradient is that of each token.
        term_BT = term_BT - term_BT.detach() * (1 - 1 / batch.mask_BT.sum(1, keepdim=True).clamp(min=1))
    return term_BT


def _cispo(row: Row, logp_BT: Tensor, ratio_BT: Tensor, batch: Batch) -> Tensor:
    assert row.epsilon_high is not None
    return cispo(ratio_BT, logp_BT, batch.weight_BT, row.epsilon_high)


_SURROGATES: dict[str, Callable[[Row, Tensor, Tensor, Batch], Tensor]] = {
    "reinforce": lambda row, logp_BT, _, batch: reinforce(logp_BT, batch.weight_BT),
    "clip": _clip,
    "cispo": _cispo,
    "sapo": lambda row, _, ratio_BT, batch: sapo(
        ratio_BT, batch.weight_BT, row.sapo_temperature_pos, row.sapo_temperature_neg
    ),
}


def _outside(row: Row, ratio_BT: Tensor, weight_BT: Tensor) -> Tensor:
    high = row.epsilon if row.epsilon_high is None else row.epsilon_high
    return ((ratio_BT > 1 + high) & (weight_BT > 0)) | ((ratio_BT < 1 - row.epsilon) & (weight_BT < 0))


# Tokens that clipping meets, for the metric; of reinforce, those that it would meet.
_HELD: dict[str, Callable[[Row, Tensor, Tensor], Tensor]] = {
    "reinforce": _outside,
    "clip": _outside,
    "cispo": lambda row, ratio_BT, _: ratio_BT > (row.epsilon if row.epsilon_high is None else row.epsilon_high),
    "sapo": lambda row, ratio_BT, _: torch.zeros_like(ratio_BT, dtype=torch.bool),
}
