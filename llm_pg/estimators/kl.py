"""Estimates of KL(π || ref) from the log-probabilities of what π sampled, with k = log π - log ref.

Their values all estimate the KL; what matters is the gradient that training gets from each, which depends on where
it is put. In the reward (a constant of the gradient, summed or to-go) k1 gives exactly ∇KL, and k2, k3 do not. In
the loss (differentiated) k1 has expected gradient 0, so it is no penalty at all; k2 and k3 summed over tokens are close
to ∇KL near the reference and drift away from it far off.

Applied by `algorithms.advantages` (in the reward) and `algorithms.loss` (in the loss).

Source: Schulman 2020, "Approximating KL divergence"; for the gradients `llm-pg prove`.
"""

import torch
from torch import Tensor


def k1(logp_BT: Tensor, ref_logp_BT: Tensor) -> Tensor:
    """k: unbiased as a value, may be negative. Natural logarithm, shape (B, T).

    Args:
        logp_BT: log-probabilities of the sampled tokens under the policy in training, nats, shape (B, T).
        ref_logp_BT: log-probabilities of the same tokens under the reference, nats, shape (B, T).
    """
    return logp_BT - ref_logp_BT


def k2(logp_BT: Tensor, ref_logp_BT: Tensor) -> Tensor:
    """k²/2: never negative, biased as a value, small variance. Its gradient is k ∇log π.

    Args:
        logp_BT: log-probabilities of the sampled tokens under the policy in training, nats, shape (B, T).
        ref_logp_BT: log-probabilities of the same tokens under the reference, nats, shape (B, T).
    """
    return 0.5 * (logp_BT - ref_logp_BT) ** 2


def k3(logp_BT: Tensor, ref_logp_BT: Tensor) -> Tensor:
    """exp(-k) - 1 + k: never negative, unbiased as a value. Its gradient is (1 - exp(-k)) ∇log π.

    Args:
        logp_BT: log-probabilities of the sampled tokens under the policy in training, nats, shape (B, T).
        ref_logp_BT: log-probabilities of the same tokens under the reference, nats, shape (B, T).
    """
    k_BT = logp_BT - ref_logp_BT
    return torch.expm1(-k_BT) + k_BT


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


class AdaptiveBonus:
    """Weight of the entropy bonus that keeps the entropy from falling below a target.

    The weight rises by a constant after an update at or under the target and falls by it after one above. It is applied
    only where the entropy of the update before was at or under the target, so not in the first.

    Args:
        coef: the weight to begin with, >= 0.
        target: nats a token, >= 0.
        delta: change of one update, >= 0.
        lowest: least weight, >= 0.
        highest: largest weight, >= lowest.

    Source: Skywork-OR1, He et al. 2025 (arXiv 2505.22312); as in TRL 1.16.
    """

    def __init__(self, coef: float, *, target: float, delta: float, lowest: float, highest: float) -> None:
        if lowest > highest:
            raise ValueError(
                f"entropy_coef_min is {lowest:g} and entropy_coef_max {highest:g}: no weight lies between them."
            )
        self.target, self.delta, self.lowest, self.highest = target, delta, lowest, highest
        self.coef = coef
        self.entropy: float | None = None  # of the update before

    @property
    def applied(self) -> float:
        """The weight in the next update."""
        return self.coef if self.entropy is not None and self.entropy <= self.target else 0.0

    def update(self, entropy: float) -> None:
        """Moves the weight.

        Args:
            entropy: mean over the tokens of an update, nats.
        """
        change = self.delta if entropy <= self.target else -self.delta
        self.coef = min(max(self.coef + change, self.lowest), self.highest)
        self.entropy = entropy


class AdaptivePenalty:
    """Weight of a KL penalty that keeps the KL of an update near a target: a trust region without a constraint.

    The weight doubles when an update went 1.5 times past the target and halves when it stayed 1.5 times under it.

    Args:
        target: KL(old || new) of one update, nats a step, > 0.

    Source: Schulman et al. 2017 (arXiv 1707.06347, section 4), after TRPO, Schulman et al. 2015 (arXiv 1502.05477).
    """

    SLACK, FACTOR, LOWEST, HIGHEST = 1.5, 2.0, 1e-4, 1e4

    def __init__(self, target: float) -> None:
        if not target > 0:
            raise ValueError(
                f"The KL target of an update must be above 0 nats; it is {target}. 0.01 is a usual choice."
            )
        self.target = target
        self.weight = 1.0

    def update(self, kl: float) -> None:
        if kl > self.SLACK * self.target:
            self.weight = min(self.weight * self.FACTOR, self.HIGHEST)
        elif kl < self.target / self.SLACK:
            self.weight = max(self.weight / self.FACTOR, self.LOWEST)
