"""Weights whose expected update is the gradient of another objective than the mean reward."""

import torch
from torch import Tensor

from .baselines import group_mean, origin_of_group


def _chance_of_largest(rank: Tensor, others: Tensor, m: int) -> Tensor:
    """Probability that the entry of rank `rank` (0 = least) is the largest of m drawn from `others` entries."""
    chance = m / others.clamp(min=1)
    for a in range(m - 1):
        chance = chance * (rank - a).clamp(min=0) / (others - 1 - a).clamp(min=1)
    return chance


def best_of_k(x_B: Tensor, group_B: Tensor, valid_B: Tensor, k: int) -> Tensor:
    """Advantages for the objective E[max of the rewards of k completions]; with verdicts of 0 and 1 that is pass@k.

    A_i = k·(mean over sets S of k-1 others of max(x_i, max S) - mean over sets S of k others of max S). The first
    mean is the score-function weight of E[max], averaged over all choices of its companions; the second does not
    contain x_i, so it is a baseline without bias. The advantages of a group add up to 0, and k = 1 is leave-one-out.

    Bias: none. A group with fewer than k + 1 valid rollouts gets 0: there is nothing to compare with.
    Source: Walder and Karkhanis 2025 (arXiv 2505.15201), there with sets of k-1 others as baseline, which leaves
    every advantage of a verdict at 0 or above.

    Args:
        x_B: returns, any finite numbers (B,).
        group_B: int64 (B,), the number of each rollout's group, 0 to P-1.
        valid_B: bool (B,); False for rollouts without a score.
        k: completions of which the best counts, >= 1.
    """
    y_B = torch.where(valid_B, x_B - origin_of_group(x_B, group_B, valid_B), torch.zeros_like(x_B))
    same_BB = (group_B.unsqueeze(1) == group_B) & valid_B & valid_B.unsqueeze(1)
    number_B = torch.arange(len(group_B), device=x_B.device)
    tie_BB = (y_B == y_B.unsqueeze(1)) & (number_B < number_B.unsqueeze(1))
    before_BB = (y_B < y_B.unsqueeze(1)) | tie_BB  # [i, j]: j is before i
    place_B = (same_BB & before_BB).sum(1)
    others_B1 = (same_BB.sum(1) - 1).to(x_B.dtype).unsqueeze(1)
    other_BB = same_BB & (number_B != number_B.unsqueeze(1))
    rank_BB = (place_B - (place_B.unsqueeze(1) < place_B).to(place_B.dtype)).to(x_B.dtype)  # of j among all but i

    def mean_of_largest(m: int, value_BB: Tensor) -> Tensor:
        chance_BB = _chance_of_largest(rank_BB, others_B1, m)
        return torch.where(other_BB, chance_BB * value_BB, torch.zeros_like(chance_BB)).sum(1)

    with_it_B = y_B if k == 1 else mean_of_largest(k - 1, torch.maximum(y_B.unsqueeze(1), y_B))
    without_B = mean_of_largest(k, y_B.expand_as(rank_BB))
    enough_B = valid_B & (others_B1.squeeze(1) >= k)
    return torch.where(enough_B, k * (with_it_B - without_B), torch.zeros_like(y_B))


def over_the_mean(advantage_BT: Tensor, x_B: Tensor, group_B: Tensor, valid_B: Tensor) -> Tensor:
    """Each rollout's weights divided by the mean return of its group; 0 where that mean is 0.

    With verdicts of 0 and 1, success probability p and groups of G, the expected update of (R - mean)/mean is
    Σ_{k=1}^{G-1} (1/k) ∇pass@k = ((1 - (1-p)^(G-1)) / p)·∇p: the gradient of log p cut off after G - 1 terms of its
    series in 1 - p. A group without success weighs 0; that is where the last of the G terms that Σ Rᵢ∇log πᵢ / Σ Rᵢ
    has is lost.

    Bias: none for that objective. For other rewards than 0 and 1 it is not known to be the gradient of anything.
    Source: MaxRL, 2026 (arXiv 2602.02710).

    Args:
        advantage_BT: advantages, shape (B, T).
        x_B: returns, none below 0 (B,).
        group_B: int64 (B,), the number of each rollout's group, 0 to P-1.
        valid_B: bool (B,); False for rollouts without a score.
    """
    mean_B = group_mean(x_B, group_B, valid_B)
    success_B = mean_B > 0
    safe_B = torch.where(success_B, mean_B, torch.ones_like(mean_B))
    return torch.where(success_B.unsqueeze(1), advantage_BT / safe_B.unsqueeze(1), torch.zeros_like(advantage_BT))
