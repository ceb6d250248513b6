"""From scored rollouts to per-token weights, and from log-probabilities to a sum that is a loss.

`compute_advantages` folds the whole reduction into `loss_scale_BT`, whose denominator belongs to the whole batch on all
ranks. So `loss` over any cut of the batch is a plain sum, and the gradients of the cuts add up to that of the batch.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..estimators.baselines import AllSum, RunningMean, RunningMeans, batch_mean, sum_of_normalised
from ..estimators.critics import explained_variance, length_adaptive_lambda
from ..estimators.kl import KL_ESTIMATORS, AdaptiveBonus, AdaptivePenalty
from ..estimators.losses import value_loss
from ..estimators.masked import in_top_share, masked_sum
from ..estimators.objectives import best_of_k
from ..estimators.ratios import has_left, importance_ratio, sampler_correction
from ..estimators.returns import gae, reward_to_go, total_return
from ..rollouts import Rollouts, is_last
from .batch import Batch
from .functions import BASELINES, CLIPPED, CREDITS, NORMALIZATIONS, REDUCTIONS, SCALES, SURROGATES
from .registry import find_spec
from .table import STEP_BASELINES, AlgorithmSpec

__all__ = ["Algorithm", "Batch"]


def _identity(x: Tensor) -> Tensor:
    return x


def _adaptive_bonus(spec: AlgorithmSpec) -> AdaptiveBonus:
    return AdaptiveBonus(
        spec.entropy_coef,
        target=spec.entropy_target,
        delta=spec.entropy_coef_delta,
        lowest=spec.entropy_coef_min,
        highest=spec.entropy_coef_max,
    )


def _all_valid(rollouts: Rollouts) -> Rollouts:
    """The rollouts where no reward is trained on: none is missed."""
    seen = copy.copy(rollouts)
    seen.reward_BT, seen.valid_B = torch.zeros_like(rollouts.reward_BT), torch.ones_like(rollouts.valid_B)
    return seen


class Algorithm:
    """A row of the table at work. Its state is the running mean of the returns (of each role) and, with a `kl_target`,
    the weight of the penalty that keeps to it.

    Args:
        algorithm: a name of the table, `file.py:function` or `module:function`, or a `AlgorithmSpec`.
        max_completion_length: the constant of the `dr_grpo` reduction, in tokens.
        changes: fields of the row that differ, such as beta=0.001, or advantage=a function of one's own.

    Raises:
        ValueError: an unknown name, field or word, with the nearest that is known.
    """

    def __init__(
        self, algorithm: str | AlgorithmSpec = "reinforce", max_completion_length: int | None = None, **changes: Any
    ) -> None:
        spec = find_spec(algorithm, changes)
        if spec.loss_type == "dr_grpo" and not max_completion_length:
            raise ValueError("loss_type dr_grpo divides by max_completion_length; give it to Algorithm (> 0).")
        self.spec = spec
        self.max_completion_length = max_completion_length
        self.running_mean = RunningMean(spec.baseline_decay)
        self.running_means = RunningMeans(spec.baseline_decay) if spec.baseline_column is not None else None
        self.kl_penalty = AdaptivePenalty(spec.kl_target) if spec.kl_target else None
        self.entropy_bonus = _adaptive_bonus(spec) if spec.use_adaptive_entropy else None

    def check_rewards(self, rollouts: Rollouts) -> None:
        """Checks that the rewards have a meaning for this algorithm.

        Args:
            rollouts: a scored batch.

        Raises:
            ValueError: they have none (such as rewards below 0 over the mean of a group).
        """
        if self.spec.scale_rewards == "group_mean":
            least = float(total_return(rollouts.reward_BT, rollouts.discount_BT).min())
            if least < 0:
                raise ValueError(
                    f"A completion has the reward {least:g}, and {self.spec.name} divides by the mean reward of a "
                    "group, which must not fall below 0. Use rewards of 0 and 1, or algorithm rloo."
                )

    # --- from rollouts to weights

    def compute_advantages(self, rollouts: Rollouts, *, progress: float = 0.0, all_sum: AllSum = _identity) -> Batch:
        """Weights and scales of a scored batch.

        Args:
            rollouts: scored rollouts; `ref_logp_BT` where beta > 0, `teacher_logp_BT` where teacher_coef > 0,
                `value_BT` where the baseline is a critic.
            progress: share of the run that is over, 0..1, for the entropy schedule.
            all_sum: sums a tensor over ranks.
        """
        spec = self.spec
        if spec.beta and rollouts.ref_logp_BT is None:
            raise ValueError(f"beta is {spec.beta}, so the rollouts must carry ref_logp_BT.")
        if spec.teacher_coef and rollouts.teacher_logp_BT is None:
            raise ValueError(f"teacher_coef is {spec.teacher_coef}, so the rollouts must carry teacher_logp_BT.")
        if not spec.reward_coef:
            rollouts = _all_valid(rollouts)
        mask_BT = rollouts.mask_BT & rollouts.valid_B.unsqueeze(1)
        if spec.truncated == "mask":
            mask_BT = mask_BT & ~rollouts.truncated_B.unsqueeze(1)
        advantage_BT, target_BT = self._advantages(rollouts, self._rewards(rollouts), all_sum)
        if spec.teacher_coef:
            advantage_BT = advantage_BT + spec.teacher_coef * self._taught(rollouts, all_sum)
        advantage_BT = torch.where(mask_BT, advantage_BT, torch.zeros_like(advantage_BT))
        advantage_BT = NORMALIZATIONS[spec.normalize_advantages](advantage_BT, mask_BT, all_sum)
        bonus_BT = None
        if spec.top_entropy_quantile < 1:
            if rollouts.entropy_BT is None:
                share = spec.top_entropy_quantile
                raise ValueError(f"top_entropy_quantile is {share}: rollouts must carry entropy_BT.")
            high_BT = in_top_share(rollouts.entropy_BT, mask_BT, spec.top_entropy_quantile, all_sum)
            advantage_BT = torch.where(high_BT, advantage_BT, torch.zeros_like(advantage_BT))
            bonus_BT = high_BT.to(advantage_BT.dtype)
            bonus_BT = bonus_BT / all_sum(bonus_BT.sum()).clamp(min=1)
        counts = all_sum(torch.stack([rollouts.valid_B.sum(), mask_BT.sum()]).to(advantage_BT.dtype))
        num_rows, num_tokens = counts.clamp(min=1).unbind()
        return Batch(
            rollouts=rollouts,
            mask_BT=mask_BT,
            advantage_BT=advantage_BT.detach(),
            loss_scale_BT=REDUCTIONS[spec.loss_type](
                mask_BT.to(advantage_BT.dtype), num_rows, num_tokens, self.max_completion_length
            ),
            num_tokens=num_tokens,
            entropy_coef=self._entropy_coef(progress),
            ref_logp_BT=rollouts.ref_logp_BT if spec.beta and spec.kl_placement == "loss" else None,
            bonus_BT=bonus_BT,
            value_target_BT=target_BT,
            old_value_BT=rollouts.value_BT if target_BT is not None else None,
        )

    def _entropy_coef(self, progress: float) -> float:
        if self.entropy_bonus is not None:
            return self.entropy_bonus.applied
        begin, end = self.spec.entropy_coef, self.spec.entropy_coef_final
        return begin if end is None else begin + (end - begin) * min(max(progress, 0.0), 1.0)

    def _rewards(self, rollouts: Rollouts) -> Tensor:
        spec, reward_BT = self.spec, self.spec.reward_coef * rollouts.reward_BT
        if spec.truncated == "penalise":
            late_BT = is_last(rollouts.mask_BT) & rollouts.truncated_B.unsqueeze(1)
            reward_BT = reward_BT - spec.truncation_penalty * late_BT.to(reward_BT.dtype)
        if spec.beta and spec.kl_placement == "reward":
            assert rollouts.ref_logp_BT is not None
            kl_BT = KL_ESTIMATORS[spec.kl_estimator](rollouts.logp_BT, rollouts.ref_logp_BT)
            reward_BT = reward_BT - spec.beta * torch.where(rollouts.mask_BT, kl_BT, torch.zeros_like(kl_BT))
        return reward_BT

    def _advantages(self, rollouts: Rollouts, reward_BT: Tensor, all_sum: AllSum) -> tuple[Tensor, Tensor | None]:
        spec = self.spec
        if spec.needs_critic:
            return self._critic_advantages(rollouts, reward_BT)
        if spec.advantage is not None:
            return self._own_advantages(rollouts, reward_BT), None
        return_B = total_return(reward_BT, rollouts.discount_BT)
        if spec.multi_objective_aggregation == "normalize_then_sum":
            return_B = self._normalised(return_B, rollouts)
        if spec.pass_k:
            weight_B = best_of_k(return_B, rollouts.group_B, rollouts.valid_B, spec.pass_k)
            return weight_B.unsqueeze(1).expand_as(reward_BT), None
        credit_BT = CREDITS[spec.returns](return_B, reward_BT, rollouts)
        if spec.baseline_per_step:
            advantage_BT = credit_BT - self._baseline(credit_BT, rollouts, all_sum)
        else:
            advantage_BT = credit_BT - self._baseline(return_B, rollouts, all_sum).unsqueeze(1)
        return SCALES[spec.scale_rewards](advantage_BT, return_B, rollouts, all_sum), None

    def _taught(self, rollouts: Rollouts, all_sum: AllSum) -> Tensor:
        """What the teacher says of each token and of those that follow, against the same of the group's others.

        With teacher_discount 1 the expected update is the gradient of -KL(policy || teacher) of whole completions.
        """
        assert rollouts.teacher_logp_BT is not None
        spec, mask_BT = self.spec, rollouts.mask_BT
        gain_BT = -KL_ESTIMATORS["k1"](rollouts.logp_BT, rollouts.teacher_logp_BT)
        gain_BT = torch.where(mask_BT, gain_BT, torch.zeros_like(gain_BT))
        if not spec.teacher_discount:
            return gain_BT
        to_go_BT = reward_to_go(gain_BT, spec.teacher_discount * rollouts.discount_BT, rollouts.cut_BT, None)
        if spec.baseline not in STEP_BASELINES:
            return to_go_BT
        return to_go_BT - BASELINES[spec.baseline](to_go_BT, rollouts, 0.0, all_sum)

    def _normalised(self, return_B: Tensor, rollouts: Rollouts) -> Tensor:
        part_B, weight_B = rollouts.part_reward_B, rollouts.part_weight_B
        if part_B is None or weight_B is None:  # one function alone
            part_B, weight_B = return_B.unsqueeze(1), torch.ones_like(return_B).unsqueeze(1)
        return sum_of_normalised(part_B.to(return_B.dtype), weight_B, rollouts.group_B, rollouts.valid_B)

    def _own_advantages(self, rollouts: Rollouts, reward_BT: Tensor) -> Tensor:
        """What the user's function makes of the rollouts, whose rewards are those after fines and KL."""
        assert self.spec.advantage is not None
        seen = copy.copy(rollouts)
        seen.reward_BT = reward_BT
        weight = self.spec.advantage(seen)
        shape = tuple(reward_BT.shape)
        if not isinstance(weight, Tensor) or tuple(weight.shape) not in (shape[:1], shape):
            got = f"shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else f"a {type(weight).__name__}"
            raise ValueError(
                f"The advantage function of algorithm {self.spec.name} returned {got} for {shape[0]} rollouts of "
                f"{shape[1]} steps; it must return a tensor ({shape[0]},), one weight a rollout, or {shape}, one a "
                "step."
            )
        advantage_BT = weight.unsqueeze(1) if weight.dim() == 1 else weight
        return advantage_BT.to(reward_BT.dtype).expand_as(reward_BT)

    def _critic_advantages(self, rollouts: Rollouts, reward_BT: Tensor) -> tuple[Tensor, Tensor]:
        if rollouts.value_BT is None:
            raise ValueError("baseline 'value' needs a critic: the rollouts carry no value_BT.")
        bootstrap_BT = torch.zeros_like(reward_BT) if rollouts.bootstrap_BT is None else rollouts.bootstrap_BT
        spec, lam = self.spec, self.spec.lam
        policy_lam: float | Tensor = lam
        if spec.lam_length_alpha is not None:
            policy_lam = length_adaptive_lambda(rollouts.length_B, spec.lam_length_alpha).to(reward_BT.dtype)
        value_lam = lam if spec.lam_value is None else spec.lam_value
        along = (reward_BT, rollouts.value_BT, rollouts.discount_BT, rollouts.cut_BT, bootstrap_BT)
        advantage_BT = gae(*along, policy_lam)
        same = spec.lam_length_alpha is None and value_lam == lam
        target_BT = rollouts.value_BT + (advantage_BT if same else gae(*along, value_lam))
        return advantage_BT, target_BT.detach()

    def explained_variance(self, rollouts: Rollouts, mask_BT: Tensor, all_sum: AllSum = _identity) -> float | None:
        """Explained variance of the rewards-to-go (penalties in the reward included) by `value_BT`; see `critics`.

        Args:
            rollouts: a scored batch with `value_BT`.
            mask_BT: steps that count.
            all_sum: sums a tensor over ranks.
        """
        assert rollouts.value_BT is not None
        return_BT = reward_to_go(self._rewards(rollouts), rollouts.discount_BT, rollouts.cut_BT, rollouts.bootstrap_BT)
        return explained_variance(rollouts.value_BT, return_BT, mask_BT, all_sum)

    def _baseline(self, return_B: Tensor, rollouts: Rollouts, all_sum: AllSum) -> Tensor:
        if self.running_means is not None:
            return self._baseline_of_roles(self.running_means, return_B, rollouts, all_sum)
        baseline_B = BASELINES[self.spec.baseline](return_B, rollouts, self.running_mean.value, all_sum)
        if self.spec.baseline == "running_mean":  # of the batches before this one
            mean = batch_mean(return_B, rollouts.valid_B, all_sum)
            self.running_mean.update(mean, all_sum(rollouts.valid_B.sum().to(mean.dtype)))
        return baseline_B

    def _baseline_of_roles(self, means: RunningMeans, return_B: Tensor, rollouts: Rollouts, all_sum: AllSum) -> Tensor:
        if rollouts.role_B is None:
            raise ValueError(
                f"baseline_column is {self.spec.baseline_column!r}, so the rollouts must carry role_B: the number of "
                "each row's role, `RunningMeans.role_of` what the column holds."
            )
        known_B = means.value_B(rollouts.role_B).to(return_B.dtype)
        baseline_B = BASELINES[self.spec.baseline](return_B, rollouts, known_B, all_sum)
        means.update(return_B, rollouts.role_B, rollouts.valid_B, all_sum)
        return baseline_B

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
            batch: the same rows of what `compute_advantages` returned.
            entropy_BT: token entropies in nats, needed where entropy_coef is not 0.
            value_BT: the critic's present values, needed where the batch has value targets.
            measure: False leaves out the statistics of the ratios, which cost as much as the loss of a small batch.
        """
        spec, mask_BT = self.spec, batch.mask_BT
        # Junk outside the mask would come back through the gradient of exp, as 0 · inf, though no sum reads it.
        outside_BT = ~mask_BT
        logp_BT = logp_BT.masked_fill(outside_BT, 0.0)
        proximal_logp_BT = (
            logp_BT.detach() if batch.proximal_logp_BT is None else batch.proximal_logp_BT.masked_fill(outside_BT, 0.0)
        )
        ratio_BT = importance_ratio(logp_BT, proximal_logp_BT, mask_BT, spec.importance_sampling_level)
        own_loss = self._own_loss(logp_BT, proximal_logp_BT, batch)
        term_BT = torch.zeros_like(logp_BT)
        if own_loss is None:
            term_BT = SURROGATES[spec.surrogate](spec, logp_BT, ratio_BT, batch)
        stats = self._ratio_stats(logp_BT, proximal_logp_BT, ratio_BT, batch) if measure else {}
        term_BT, cut_stats = self._corrected(term_BT, logp_BT, proximal_logp_BT, batch)
        stats.update(cut_stats)
        if batch.ref_logp_BT is not None:
            kl_BT = KL_ESTIMATORS[spec.kl_estimator](logp_BT, batch.ref_logp_BT.masked_fill(outside_BT, 0.0))
            if spec.use_bias_correction_kl:
                kl_BT = kl_BT * ratio_BT
            term_BT = term_BT + spec.beta * kl_BT
        if self.kl_penalty is not None:
            # The steps were sampled by the old policy, so k3 with the old one first is an exact KL(old || new).
            term_BT = term_BT + self.kl_penalty.weight * KL_ESTIMATORS["k3"](proximal_logp_BT, logp_BT)
        loss = masked_sum(term_BT * batch.loss_scale_BT, mask_BT)
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
            error_BT = value_loss(value_BT, batch.value_target_BT, batch.old_value_BT, spec.value_clip)
            value_term = masked_sum(error_BT, mask_BT) / batch.num_tokens
            stats["value_loss"] = value_term.detach()
            loss = loss + spec.vf_coef * value_term
        return loss, stats

    def _own_loss(self, logp_BT: Tensor, proximal_logp_BT: Tensor, batch: Batch) -> Tensor | None:
        """What the user's function makes of these rows; None where there is none."""
        if self.spec.loss is None:
            return None
        loss = self.spec.loss(logp_BT, dataclasses.replace(batch, proximal_logp_BT=proximal_logp_BT))
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(
                f"The loss function of algorithm {self.spec.name} returned {got}; it must return a scalar, the sum "
                "over its rows of terms times batch.loss_scale_BT. `llm-pg prove --loss FILE:FUNCTION` tries it."
            )
        return loss

    def _corrected(
        self, term_BT: Tensor, logp_BT: Tensor, proximal_logp_BT: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy term less what the sampler is to blame for, and the shares of tokens that this met."""
        spec, mask_BT, stats = self.spec, batch.mask_BT, {}
        behavior_logp_BT = batch.rollouts.logp_BT.masked_fill(~mask_BT, 0.0)
        if spec.off_policy_mask_threshold is not None:
            left_B1 = has_left(logp_BT, behavior_logp_BT, mask_BT, spec.off_policy_mask_threshold)
            dropped_BT = left_B1 & (batch.advantage_BT < 0)
            term_BT = term_BT.masked_fill(dropped_BT, 0.0)
            stats["off_policy_masked"] = masked_sum(dropped_BT.to(term_BT.dtype), mask_BT) / batch.num_tokens
        if spec.vllm_importance_sampling_correction:
            correction_BT, bounded_BT = sampler_correction(
                proximal_logp_BT,
                behavior_logp_BT,
                mask_BT,
                spec.vllm_importance_sampling_mode,
                spec.vllm_importance_sampling_clip_min,
                spec.vllm_importance_sampling_clip_max,
            )
            term_BT = term_BT * correction_BT
            stats["correction_bounded"] = masked_sum(bounded_BT.to(term_BT.dtype), mask_BT) / batch.num_tokens
        return term_BT, stats

    @torch.no_grad()
    def _ratio_stats(
        self, logp_BT: Tensor, proximal_logp_BT: Tensor, ratio_BT: Tensor, batch: Batch
    ) -> dict[str, Tensor]:
        spec, n = self.spec, batch.num_tokens
        change_BT = logp_BT - proximal_logp_BT
        held_BT = CLIPPED[spec.surrogate](spec, logp_BT, ratio_BT, batch.advantage_BT)
        low_BT, high_BT = held_BT & (batch.advantage_BT < 0), held_BT & (batch.advantage_BT > 0)
        behavior_logp_BT = batch.rollouts.logp_BT
        return {
            "clip_fraction": masked_sum(held_BT.to(logp_BT.dtype), batch.mask_BT) / n,
            "clip_ratio/low_mean": masked_sum(low_BT.to(logp_BT.dtype), batch.mask_BT) / n,
            "clip_ratio/high_mean": masked_sum(high_BT.to(logp_BT.dtype), batch.mask_BT) / n,
            "approx_kl": masked_sum(torch.expm1(change_BT) - change_BT, batch.mask_BT) / n,
            "sampler_gap": masked_sum((proximal_logp_BT - behavior_logp_BT).abs(), batch.mask_BT) / n,
        }

    def observe_kl(self, kl: float) -> None:
        """Moves the adaptive penalty after an update.

        Args:
            kl: KL(old || new) of the update, nats for each step (`approx_kl`).
        """
        if self.kl_penalty is not None:
            self.kl_penalty.update(kl)

    def observe_entropy(self, entropy: float) -> None:
        """Moves the weight of the adaptive entropy bonus after an update.

        Args:
            entropy: mean over the tokens of the update, nats.
        """
        if self.entropy_bonus is not None:
            self.entropy_bonus.update(entropy)

    def contributes_B(self, batch: Batch) -> Tensor:
        """True for rows whose gradient can differ from 0; the others need no forward pass.

        A row of weight 0 still counts where a KL is in the loss, with an entropy bonus (or one that follows the
        entropy of all rows), or with a critic.

        Args:
            batch: of `compute_advantages`.
        """
        kl = batch.ref_logp_BT is not None or self.kl_penalty is not None
        anyway = kl or self.entropy_bonus is not None or batch.entropy_coef or batch.value_target_BT is not None
        return batch.mask_BT.any(1) if anyway else ((batch.advantage_BT != 0) & batch.mask_BT).any(1)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"running_mean": self.running_mean.state_dict()}
        if self.running_means is not None:
            state["running_means"] = self.running_means.state_dict()
        if self.kl_penalty is not None:
            state["kl_penalty"] = self.kl_penalty.weight
        if self.entropy_bonus is not None:
            state["entropy_bonus"] = {"coef": self.entropy_bonus.coef, "entropy": self.entropy_bonus.entropy}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.running_mean.load_state_dict(state["running_mean"])
        if self.running_means is not None and "running_means" in state:
            self.running_means.load_state_dict(state["running_means"])
        if self.kl_penalty is not None and "kl_penalty" in state:  # else of a run without, gone on from all the same
            self.kl_penalty.weight = float(state["kl_penalty"])
        if self.entropy_bonus is not None and "entropy_bonus" in state:
            self.entropy_bonus.coef = state["entropy_bonus"]["coef"]
            self.entropy_bonus.entropy = state["entropy_bonus"]["entropy"]
