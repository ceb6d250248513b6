"""Per-token surrogates. Each returns (B, T); `algorithms.loss` multiplies by the scale and sums.

`advantage_BT` is a constant of the gradient. With the ratio 1 (data sampled by the policy that is trained, once) all
surrogates have the gradient -advantage · ∇logp.
"""

import math

import torch
from torch import Tensor

from .masked import masked_sum
from .ratios import clip_range


def reinforce(logp_BT: Tensor, advantage_BT: Tensor) -> Tensor:
    """-w log π: the score-function gradient, on-policy only, as it has no ratio.

    Args:
        logp_BT: log-probabilities of the sampled tokens under the policy in training, nats, shape (B, T).
        advantage_BT: advantages, constants of the gradient, shape (B, T).

    Source: Williams 1992.
    """
    return -advantage_BT * logp_BT


def clipped(
    ratio_BT: Tensor,
    advantage_BT: Tensor,
    epsilon: float,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> Tensor:
    """-min(r w, clip(r) w): no gain from moving the ratio further than epsilon from 1.

    Args:
        ratio_BT: importance ratios, > 0, shape (B, T).
        advantage_BT: advantages, constants of the gradient, shape (B, T).
        epsilon: lower width of the range around 1, > 0.
        epsilon_high: upper width, > 0; None = `epsilon` (DAPO sets it wider).
        delta: upper bound of the ratio also where the advantage is negative (two-sided clipping, > 1 + epsilon_high);
            None = no bound.

    Bias: none at ratio 1; away from it, by design.
    Source: Schulman et al. 2017 (arXiv 1707.06347); clip-higher: DAPO, Yu et al. 2025 (arXiv 2503.14476); two-sided:
    INTELLECT-2, 2025 (arXiv 2505.07291).
    """
    bounded_BT = ratio_BT if delta is None else ratio_BT.clamp(max=delta)
    return -torch.minimum(bounded_BT * advantage_BT, clip_range(ratio_BT, epsilon, epsilon_high) * advantage_BT)


def cispo(ratio_BT: Tensor, logp_BT: Tensor, advantage_BT: Tensor, epsilon_high: float) -> Tensor:
    """-min(r, epsilon_high)·w·log π with the ratio a constant: clipped tokens keep a gradient.

    Args:
        ratio_BT: importance ratios, > 0, shape (B, T).
        logp_BT: log-probabilities of the sampled tokens under the policy in training, nats, shape (B, T).
        advantage_BT: advantages, constants of the gradient, shape (B, T).
        epsilon_high: bound of the ratio itself (TRL's meaning), not a distance from 1.

    Source: MiniMax-M1, 2025 (arXiv 2506.13585).
    """
    return -ratio_BT.detach().clamp(max=epsilon_high) * advantage_BT * logp_BT


def sapo(ratio_BT: Tensor, advantage_BT: Tensor, temperature_pos: float, temperature_neg: float) -> Tensor:
    """-(4/τ)·σ(τ(r - 1))·w: a gate that closes gradually as the ratio leaves 1, instead of clipping.

    The gradient is that of -r·w times 4σ(1 - σ), which is 1 at ratio 1 and falls on both sides of it, whatever the
    weight's sign; a larger τ closes sooner.

    Args:
        ratio_BT: importance ratios, > 0, shape (B, T).
        advantage_BT: advantages, constants of the gradient, shape (B, T).
        temperature_pos: τ where the advantage is positive, > 0.
        temperature_neg: τ elsewhere, > 0.

    Bias: none at ratio 1; away from it, by design.
    Source: Gao et al. 2025 (arXiv 2511.20347).
    """
    high, low = torch.full_like(advantage_BT, temperature_pos), torch.full_like(advantage_BT, temperature_neg)
    tau_BT = torch.where(advantage_BT > 0, high, low)
    return -torch.sigmoid(tau_BT * (ratio_BT - 1)) * 4 / tau_BT * advantage_BT


def vespo(
    ratio_BT: Tensor, logp_BT: Tensor, advantage_BT: Tensor, k: tuple[float, float], lam: tuple[float, float]
) -> Tensor:
    """-φ(r)·A·log π with φ(r) = e^λ r^k e^(-λr), a constant of the gradient: a gate in the place of the ratio.

    φ(1) = 1. It has its maximum at r = k/λ and falls on both sides of it, so that completions that the policy has left
    far, or come to far, teach little.

    Args:
        ratio_BT: importance ratio, > 0; of whole completions (level sequence_sum) as in the paper.
        logp_BT: log-probabilities under the policy in training, nats.
        advantage_BT: advantage.
        k: exponent where the advantage is at least 0, and elsewhere, > 0.
        lam: decay of the same, > 0.

    Bias: none at ratio 1; away from it, by design.
    Source: VESPO, 2026 (arXiv 2602.10693); logarithms are held in [log 1e-8, 20], as in TRL 1.16.
    """
    log_ratio_BT = ratio_BT.detach().log().clamp(math.log(1e-8), 20.0)
    full = torch.full_like
    k_BT, lam_BT = (
        torch.where(advantage_BT >= 0, full(advantage_BT, gain), full(advantage_BT, loss)) for gain, loss in (k, lam)
    )
    gate_BT = (lam_BT + k_BT * log_ratio_BT - lam_BT * log_ratio_BT.exp()).exp()
    return -gate_BT * advantage_BT * logp_BT


def gmpo(ratio_BT: Tensor, mask_BT: Tensor, advantage_BT: Tensor, epsilon: float, epsilon_high: float) -> Tensor:
    """-w·g with g the geometric mean of a row's ratios, each clipped on its own: one wild token moves it little.

    Every token's term has the row's value; its gradient is that of its own log-ratio, so that with the reduction grpo
    (mean over a row's tokens, then over rows) value and gradient are the paper's.

    Args:
        ratio_BT: importance ratios of tokens, > 0, shape (B, T).
        mask_BT: bool (B, T), the sampled tokens.
        advantage_BT: advantages, constants of the gradient, shape (B, T).
        epsilon: lower width of the range of log ratios around 0, > 0.
        epsilon_high: upper width, > 0.

    Bias: none at ratio 1 but that of the reduction; away from it, by design.
    Source: Zhao et al. 2025 (arXiv 2507.20673).
    """
    log_ratio_BT = ratio_BT.log()
    high_BT, low_BT = log_ratio_BT.clamp(max=epsilon_high), log_ratio_BT.clamp(min=-epsilon)
    held_BT = torch.where(advantage_BT > 0, high_BT, low_BT)
    mean_B1 = masked_sum(held_BT.detach(), mask_BT, 1).unsqueeze(1) / mask_BT.sum(1, keepdim=True).clamp(min=1)
    return -advantage_BT * mean_B1.exp() * (held_BT - held_BT.detach()).exp()


def outside_divergence(
    logp_BT: Tensor, ratio_BT: Tensor, advantage_BT: Tensor, kind: str, epsilon: float, epsilon_high: float
) -> Tensor:
    """Where a token has left the policy that sampled by more than a divergence, and its gradient would lead further:
    bool (B, T).

    The divergence is that of two outcomes, this token or another: of probabilities p now and q before, |p - q|
    (binary_tv) or q log(q/p) + (1 - q) log((1 - q)/(1 - p)) (binary_kl). A ratio says little of it: from 1e-4 to 3e-4
    is a ratio of 3 and next to no divergence.

    Args:
        logp_BT: log-probabilities of the sampled tokens under the policy in training, nats, shape (B, T).
        ratio_BT: importance ratios of tokens, > 0, shape (B, T).
        advantage_BT: advantages, shape (B, T).
        kind: binary_tv or binary_kl.
        epsilon: bound where the advantage is negative, > 0; a share of probability, or nats.
        epsilon_high: bound where it is positive.

    Source: DPPO, Qi et al. 2026 (arXiv 2602.04879).
    """
    logp_BT, log_ratio_BT = logp_BT.detach(), ratio_BT.detach().log()
    old_logp_BT = (logp_BT - log_ratio_BT).clamp(max=0.0)
    now_BT, old_BT = logp_BT.exp().clamp(max=1.0), old_logp_BT.exp()
    if kind == "binary_tv":
        divergence_BT = (now_BT - old_BT).abs()
    else:
        rest_BT = (1 - old_BT) * (torch.log1p(-old_BT.clamp(max=1 - 1e-6)) - torch.log1p(-now_BT.clamp(max=1 - 1e-6)))
        divergence_BT = -old_BT * log_ratio_BT + rest_BT
    up_BT = (advantage_BT > 0) & (log_ratio_BT > 0) & (divergence_BT > epsilon_high)
    return up_BT | ((advantage_BT < 0) & (log_ratio_BT < 0) & (divergence_BT > epsilon))
