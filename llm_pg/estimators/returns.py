"""Returns and GAE along a row of steps; `algorithms.advantages` makes advantages of them.

One convention of time for tokens and control steps. `discount_BT` is the factor between step t and t+1: γ inside an
episode, 0 where the episode ends at step t (nothing follows). `cut_BT` is True where the row stops although the
episode does not (a time limit, the end of a segment): there `bootstrap_BT` replaces what would have followed.
Steps outside the mask have reward 0 and discount 0.
"""

import torch
from torch import Tensor


def _backward_sum(x_BT: Tensor, keep_BT: Tensor) -> Tensor:
    """y_t = x_t + keep_t y_{t+1}, with nothing after the last column."""
    y_B = torch.zeros_like(x_BT[:, 0])
    out = []
    for x_B, keep_B in zip(reversed(x_BT.unbind(1)), reversed(keep_BT.unbind(1)), strict=True):
        y_B = torch.addcmul(x_B, keep_B, y_B)
        out.append(y_B)
    return torch.stack(out[::-1], dim=1)


def reward_to_go(
    reward_BT: Tensor, discount_BT: Tensor, cut_BT: Tensor | None = None, bootstrap_BT: Tensor | None = None
) -> Tensor:
    """G_t = r_t + d_t G_{t+1}, where a cut takes the bootstrap value in the place of G_{t+1}.

    Bias: none for Monte Carlo rows (no cut); at a cut, that of the bootstrap value. Dropping the rewards before t
    (causality) leaves the mean of the gradient and lowers its variance.

    Args:
        reward_BT: r_t, shape (B, T).
        discount_BT: d_t in [0, 1], 0 where the episode ends.
        cut_BT: bool; None = no cuts.
        bootstrap_BT: V(s_{t+1}), read only where `cut_BT`; None = 0.

    Source: Williams 1992; Sutton et al. 2000.
    """
    if cut_BT is None:
        return _backward_sum(reward_BT, discount_BT)
    cut_BT = cut_BT.bool()
    if bootstrap_BT is not None:
        reward_BT = reward_BT + discount_BT * torch.where(cut_BT, bootstrap_BT, torch.zeros_like(bootstrap_BT))
    return _backward_sum(reward_BT, discount_BT.masked_fill(cut_BT, 0.0))


def total_return(reward_BT: Tensor, discount_BT: Tensor) -> Tensor:
    """Σ_t (Π_{s<t} d_s) r_t, the discounted return from the first step: (B, T) -> (B,).

    Args:
        reward_BT: r_t, shape (B, T).
        discount_BT: d_t in [0, 1], shape (B, T); 0 where the episode ends.
    """
    ahead_BT = torch.cat([torch.ones_like(discount_BT[:, :1]), discount_BT[:, :-1]], 1).cumprod(1)
    return (ahead_BT * reward_BT).sum(1)


def next_values(value_BT: Tensor, cut_BT: Tensor, bootstrap_BT: Tensor) -> Tensor:
    """V(s_{t+1}): the next column, or the bootstrap value where the row is cut; 0 after the last column.

    Args:
        value_BT: V(s_t), shape (B, T).
        cut_BT: bool (B, T); True where the row stops and the episode does not.
        bootstrap_BT: V(s_{t+1}) where `cut_BT`, shape (B, T).
    """
    shifted_BT = torch.cat([value_BT[:, 1:], torch.zeros_like(value_BT[:, :1])], 1)
    return torch.where(cut_BT.bool(), bootstrap_BT, shifted_BT)


def td_error(reward_BT: Tensor, value_BT: Tensor, discount_BT: Tensor, cut_BT: Tensor, bootstrap_BT: Tensor) -> Tensor:
    """δ_t = r_t + d_t V(s_{t+1}) - V(s_t), shape (B, T).

    Bias: unbiased as an advantage only where V is exact.

    Args:
        reward_BT: r_t, shape (B, T).
        value_BT: V(s_t), shape (B, T).
        discount_BT: d_t in [0, 1], shape (B, T); 0 where the episode ends.
        cut_BT: bool (B, T); True where the row stops and the episode does not.
        bootstrap_BT: V(s_{t+1}) where `cut_BT`, shape (B, T).

    Source: Sutton 1988.
    """
    return reward_BT + discount_BT * next_values(value_BT, cut_BT, bootstrap_BT) - value_BT


def gae(
    reward_BT: Tensor,
    value_BT: Tensor,
    discount_BT: Tensor,
    cut_BT: Tensor,
    bootstrap_BT: Tensor,
    lam: float | Tensor,
) -> Tensor:
    """A_t = δ_t + d_t λ A_{t+1}: the exponential average of the n-step advantages.

    Bias: none at λ = 1 (Monte Carlo minus the value); below it, that of the critic, shrinking as λ grows; none at
    any λ when V is exact.

    Args:
        reward_BT: r_t, shape (B, T).
        value_BT: V(s_t), shape (B, T).
        discount_BT: d_t in [0, 1], shape (B, T); 0 where the episode ends.
        cut_BT: bool (B, T); the sum stops there after its own δ.
        bootstrap_BT: V(s_{t+1}) where `cut_BT`, shape (B, T).
        lam: λ in [0, 1], a number or one for each row (B,).

    Returns:
        A_t, shape (B, T). The value target is A_t + V(s_t).

    Source: Schulman et al. 2016 (arXiv 1506.02438).
    """
    delta_BT = td_error(reward_BT, value_BT, discount_BT, cut_BT, bootstrap_BT)
    lam_B1 = lam.unsqueeze(1) if isinstance(lam, Tensor) and lam.dim() == 1 else lam
    return _backward_sum(delta_BT, discount_BT.masked_fill(cut_BT.bool(), 0.0) * lam_B1)
