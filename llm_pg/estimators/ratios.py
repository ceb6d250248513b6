"""Importance ratios π(a)/π_old(a) between the policy that is trained and the one that sampled."""

import torch
from torch import Tensor

from .masked import masked_sum


def importance_ratio(logp_BT: Tensor, old_logp_BT: Tensor, mask_BT: Tensor, level: str) -> Tensor:
    """The ratio of each token, (B, T), at one of three levels; its gradient with respect to token t is ratio · ∇logp_t.

    * `token`: π(a_t)/π_old(a_t). Ignores that the prefix was sampled by the old policy.
    * `sequence`: the geometric mean over the row, exp(mean_t log ratio_t), the same for all tokens (GSPO).
    * `sequence_sum`: the product over the row, the true weight of the whole completion; unbiased, large variance.

    At the sequence levels the value is the row's and the gradient is passed through each token's own
    log-probability, so that per-token weights keep their meaning ("GSPO-token").

    Source: PPO, Schulman et al. 2017 (arXiv 1707.06347); GSPO, Zheng et al. 2025 (arXiv 2507.18071).
    """
    log_ratio_BT = logp_BT - old_logp_BT
    if level == "token":
        return log_ratio_BT.exp()
    row_B1 = masked_sum(log_ratio_BT, mask_BT, 1).unsqueeze(1)
    if level == "sequence":
        row_B1 = row_B1 / mask_BT.sum(1, keepdim=True).clamp(min=1)
    elif level != "sequence_sum":
        raise ValueError(f"unknown importance_sampling_level {level!r}; use token, sequence or sequence_sum.")
    return row_B1.detach().exp() * (logp_BT - logp_BT.detach()).exp()


def clip_range(ratio: Tensor, epsilon: float, epsilon_high: float | None = None) -> Tensor:
    """The ratio held inside [1 - epsilon, 1 + epsilon_high] (epsilon_high = epsilon when None)."""
    return torch.clamp(ratio, 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
