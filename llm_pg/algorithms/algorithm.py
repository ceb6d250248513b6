"""Puts `advantages` and `loss` together for one `AlgorithmSpec`, and holds what an algorithm remembers between steps.

`compute_advantages` folds the whole reduction into `loss_scale_BT`, whose denominator belongs to the whole batch on all
ranks. So `loss` over any cut of the batch is a plain sum, and the gradients of the cuts add up to that of the batch.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..estimators.baselines import AllSum, RunningMean, RunningMeans
from ..estimators.critics import explained_variance
from ..estimators.kl import AdaptiveBonus, AdaptivePenalty
from ..estimators.masked import in_top_share
from ..estimators.returns import reward_to_go, total_return
from ..rollouts import Rollouts
from .advantages import NORMALIZATIONS, advantages_and_targets, penalized_rewards, teacher_advantages
from .batch import Batch
from .loss import REDUCTIONS, policy_loss
from .registry import find_spec
from .spec import AlgorithmSpec

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
    """Computes advantages and the loss of one `AlgorithmSpec`.

    Its state is the running mean of the returns (of each role) and, with a `kl_target`, the weight of the penalty that
    keeps to it.

    Args:
        algorithm: a name of the table, `file.py:function` or `module:function`, or an `AlgorithmSpec`.
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

    def compute_advantages(self, rollouts: Rollouts, *, progress: float = 0.0, all_sum: AllSum = _identity) -> Batch:
        """Computes the advantages and the scales of the loss of a scored batch.

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
        advantage_BT, target_BT = advantages_and_targets(spec, rollouts, self.running_mean, self.running_means, all_sum)
        if spec.teacher_coef:
            advantage_BT = advantage_BT + spec.teacher_coef * teacher_advantages(spec, rollouts, all_sum)
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

    def explained_variance(self, rollouts: Rollouts, mask_BT: Tensor, all_sum: AllSum = _identity) -> float | None:
        """Explained variance of the rewards-to-go (penalties in the reward included) by `value_BT`; see `critics`.

        Args:
            rollouts: a scored batch with `value_BT`.
            mask_BT: steps that count.
            all_sum: sums a tensor over ranks.
        """
        assert rollouts.value_BT is not None
        return_BT = reward_to_go(
            penalized_rewards(self.spec, rollouts), rollouts.discount_BT, rollouts.cut_BT, rollouts.bootstrap_BT
        )
        return explained_variance(rollouts.value_BT, return_BT, mask_BT, all_sum)

    def loss(
        self,
        logp_BT: Tensor,
        batch: Batch,
        *,
        entropy_BT: Tensor | None = None,
        value_BT: Tensor | None = None,
        measure: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the sum over these rows, and sums for the metrics (each adds up over cuts).

        Args:
            logp_BT: log π of the sampled actions under the policy in training, with its gradient.
            batch: the same rows of what `compute_advantages` returned.
            entropy_BT: token entropies in nats, needed where entropy_coef is not 0.
            value_BT: the critic's present values, needed where the batch has value targets.
            measure: False leaves out the statistics of the ratios, which cost as much as the loss of a small batch.
        """
        return policy_loss(
            self.spec,
            logp_BT,
            batch,
            entropy_BT=entropy_BT,
            value_BT=value_BT,
            kl_weight=None if self.kl_penalty is None else self.kl_penalty.weight,
            measure=measure,
        )

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
