"""What goes with a learned critic: its loss, how well it predicts, and how far to trust it by length."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def value_loss(
    value_BT: Tensor, target_BT: Tensor, old_value_BT: Tensor | None = None, clip: float | None = None
) -> Tensor:
    """½(V - target)²; with `clip`, the larger of it and the loss of a V held within `clip` of its old value.

    Args:
        value_BT: V(s_t) of the critic in training, shape (B, T).
        target_BT: what V should be, a constant, shape (B, T).
        old_value_BT: V(s_t) before the update, shape (B, T); None = no clipping.
        clip: largest change of V that the loss rewards, > 0; None = no clipping.
    """
    loss_BT = 0.5 * (value_BT - target_BT) ** 2
    if clip is None or old_value_BT is None:
        return loss_BT
    held_BT = old_value_BT + (value_BT - old_value_BT).clamp(-clip, clip)
    return torch.maximum(loss_BT, 0.5 * (held_BT - target_BT) ** 2)


def length_adaptive_lambda(length_B: Tensor, alpha: float) -> Tensor:
    """λ of each row's advantages, 1 - 1/(α·l) held to [0, 1]: the weights λ^k then sum to α·l, a share of the row.

    Bias: that of GAE at this λ; long rows are weighed almost as Monte Carlo ones, rows of at most 1/α steps by their
    one-step errors alone (λ = 0), so α should be well above 1 / (usual length).

    Args:
        length_B: steps of each row, > 0.
        alpha: share of the row over which the errors are summed, > 0; the source takes 0.05 for thousands of tokens.

    Source: VAPO, Yue et al. 2025 (arXiv 2504.05118).
    """
    return (1 - 1 / (alpha * length_B.clamp(min=1).to(torch.float64))).clamp(0.0, 1.0)


def _identity(x: Tensor) -> Tensor:
    return x


def explained_variance(
    value_BT: Tensor, return_BT: Tensor, mask_BT: Tensor, all_sum: Callable[[Tensor], Tensor] = _identity
) -> float | None:
    """1 - Var[G - V] / Var[G] over the steps inside the mask: 1 predicts all, 0 no better than a constant, < 0 worse.

    Args:
        value_BT: V(s_t) as it was before the returns were known. return_BT: G_t. all_sum: sums a tensor over ranks.

    Returns:
        None where the returns do not vary (to twelve digits), so that there is nothing to explain.
    """
    inside = mask_BT.to(torch.float64)
    target = torch.where(mask_BT, return_BT, torch.zeros_like(return_BT)).to(torch.float64)
    error = target - torch.where(mask_BT, value_BT, torch.zeros_like(value_BT)).to(torch.float64)
    sums = all_sum(torch.stack([x.sum() for x in (inside, target, target**2, error, error**2)]))
    n, first, second, error_first, error_second = sums.tolist()
    if not n:
        return None
    spread = second / n - (first / n) ** 2
    if spread <= 1e-12 * max(second / n, 1e-300):
        return None
    return 1 - (error_second / n - (error_first / n) ** 2) / spread
