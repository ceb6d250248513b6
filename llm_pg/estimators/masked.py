"""Sums and means over the steps that were really taken."""

from collections.abc import Callable

import torch
from torch import Tensor


def masked_sum(x_BT: Tensor, mask_BT: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `x_BT` where `mask_BT` is true; a NaN or inf outside the mask does not reach the result.

    Args:
        x_BT: any finite values inside the mask, shape (B, T).
        mask_BT: bool or 0/1, shape (B, T).
        dim: axis to sum over; None sums over both.
    """
    kept = torch.where(mask_BT.bool(), x_BT, torch.zeros_like(x_BT))
    return kept.sum() if dim is None else kept.sum(dim)


def in_top_share(
    x_BT: Tensor, mask_BT: Tensor, share: float, all_sum: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """True where `x_BT` is among the largest `share` of the entries inside the mask, of all ranks together.

    Of n entries the n - ⌈(1 - share)(n - 1)⌉ largest are in, and those equal to the least of them: what is at or
    above the quantile 1 - share. The least is found by halving, which needs no rank to know the others' entries.

    Args:
        x_BT: numbers in [0, 64), such as entropies in nats.
        mask_BT: bool (B, T), the sampled tokens.
        share: in [0, 1]; 0 leaves the largest entry alone.
        all_sum: sums a tensor over all ranks; the identity on one rank.
    """
    number = all_sum(mask_BT.sum().to(x_BT.dtype))
    wanted = number - ((1 - share) * (number - 1) - 1e-6).ceil().clamp(min=0)
    low, high = torch.zeros_like(number), torch.full_like(number, 64.0)
    for _ in range(64):
        middle = low + (high - low) / 2
        enough = all_sum((mask_BT & (x_BT >= middle)).sum().to(x_BT.dtype)) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return mask_BT & (x_BT >= low)


def masked_mean(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean of `x_BT` where `mask_BT` is true, a scalar; 0 where the mask is empty.

    Args:
        x_BT: any finite values inside the mask, shape (B, T).
        mask_BT: bool or 0/1, shape (B, T).
    """
    return masked_sum(x_BT, mask_BT) / mask_BT.sum().clamp(min=1)
