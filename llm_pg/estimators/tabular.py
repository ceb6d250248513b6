"""Exact values of a policy in a finite decision process of finite horizon, by dynamic programming.

The other way to ∇J: `expected_return` is differentiable, so its gradient is the one every estimator aims at.
Axes: S states, A actions, T steps of the horizon.
"""

import torch
from torch import Tensor


def state_values(
    policy_SA: Tensor, transition_SAS: Tensor, reward_SA: Tensor, horizon: int, discount: float = 1.0
) -> Tensor:
    """V_t(s): the expected discounted return from state s with horizon - t steps to go.

    V_t(s) = Σ_a π(a|s) (r(s, a) + γ Σ_s' p(s'|s, a) V_{t+1}(s')), and V_horizon = 0.

    Args:
        policy_SA: π(a|s), rows sum to 1.
        transition_SAS: p(s'|s, a); an absorbing state leads to itself.
        reward_SA: expected reward of the step; 0 in absorbing states.
        horizon: number of steps, >= 1.
        discount: γ in [0, 1].

    Returns:
        (horizon + 1, S); the last row is 0.

    Source: Bellman 1957.
    """
    value_S = torch.zeros_like(reward_SA[:, 0])
    values = [value_S]
    for _ in range(horizon):
        value_S = (policy_SA * (reward_SA + discount * transition_SAS @ value_S)).sum(1)
        values.append(value_S)
    return torch.stack(values[::-1])


def expected_return(
    policy_SA: Tensor,
    transition_SAS: Tensor,
    reward_SA: Tensor,
    start_S: Tensor,
    horizon: int,
    discount: float = 1.0,
) -> Tensor:
    """J(π) = Σ_s p(s_0 = s) V_0(s), a differentiable scalar. Arguments as in `state_values`; `start_S` sums to 1."""
    return start_S @ state_values(policy_SA, transition_SAS, reward_SA, horizon, discount)[0]


def optimal_values(transition_SAS: Tensor, reward_SA: Tensor, horizon: int, discount: float = 1.0) -> Tensor:
    """V*_t(s), the largest expected return that any policy reaches, shape (horizon + 1, S)."""
    value_S = torch.zeros_like(reward_SA[:, 0])
    values = [value_S]
    for _ in range(horizon):
        value_S = (reward_SA + discount * transition_SAS @ value_S).max(1).values
        values.append(value_S)
    return torch.stack(values[::-1])
