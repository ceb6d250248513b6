"""Rollouts with their weights: what the loss reads, and how it is cut."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..device import to_device
from ..rollouts import Rollouts


@dataclass
class Batch:
    """What training needs of a batch of rollouts, row by row.

    Attributes:
        rollouts: the rows as they were scored.
        mask_BT: steps that enter the loss.
        advantage_BT: advantage of each step, a constant of the gradient; 0 outside the mask.
        loss_scale_BT: the reduction: what each step's term is multiplied by before it is summed.
        num_tokens: steps inside the mask, on all ranks, a tensor without axes.
        entropy_coef: weight of the entropy bonus in this step.
        proximal_logp_BT: log-probabilities by the policy before the first update on this batch (TRL's
            old_per_token_logps), for the ratio; None = the present ones (first use). The sampler's are
            `rollouts.logp_BT`.
        ref_logp_BT: those of the reference, where the KL is in the loss.
        bonus_BT: what each step's entropy is multiplied by in the bonus; None = 1/num_tokens inside the mask.
        value_target_BT: what the critic learns; None = no critic.
        old_value_BT: the critic's values before the update; None = no critic.
    """

    rollouts: Rollouts
    mask_BT: Tensor
    advantage_BT: Tensor
    loss_scale_BT: Tensor
    num_tokens: Tensor
    entropy_coef: float
    proximal_logp_BT: Tensor | None = None
    ref_logp_BT: Tensor | None = None
    bonus_BT: Tensor | None = None
    value_target_BT: Tensor | None = None
    old_value_BT: Tensor | None = None

    def rows(self, index: Tensor | slice) -> Batch:
        """The same batch, cut to the rows `index`; the scales stay those of the whole.

        Args:
            index: int64, numbers of rows, in any order. Those of the host make nobody wait.
        """
        there = to_device(index, self.mask_BT.device) if isinstance(index, Tensor) else index
        from_B = {
            name: value[there] for name, value in self.__dict__.items() if value is not None and name.endswith("_BT")
        }
        return Batch(self.rollouts.rows(index), num_tokens=self.num_tokens, entropy_coef=self.entropy_coef, **from_B)

    def steps(self) -> Batch:
        """The same batch with each step inside the mask as a row of its own, for minibatches of steps.

        The weights already hold what each step owes to its row; only ratios of whole rows (`sequence` levels) are lost.
        """
        kept = self.mask_BT.reshape(-1).nonzero().squeeze(1)
        every = len(kept) == self.mask_BT.numel()
        from_BT = {
            name: value.reshape(-1, 1) if every else value.reshape(-1, 1)[kept]
            for name, value in self.__dict__.items()
            if value is not None and name.endswith("_BT")
        }
        return Batch(self.rollouts.steps(kept), num_tokens=self.num_tokens, entropy_coef=self.entropy_coef, **from_BT)
