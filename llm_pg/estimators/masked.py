"""Sums and means over the steps that were really taken."""

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


def masked_mean(x_BT: Tensor, mask_BT: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x_BT` where `mask_BT` is true; 0 where the mask is empty."""
    count = mask_BT.sum() if dim is None else mask_BT.sum(dim)
    return masked_sum(x_BT, mask_BT, dim) / count.clamp(min=1)
