"""Importance ratios π(a)/π_old(a) between the policy that is trained and the one that sampled."""

import math

import torch
from torch import Tensor

from .masked import masked_sum

_LEAST = 1e-6  # probabilities are held this far from 0 and 1 where a divergence is computed


def importance_ratio(logp_BT: Tensor, proximal_logp_BT: Tensor, mask_BT: Tensor, level: str) -> Tensor:
    """The ratio of each token, (B, T), at one of three levels; its gradient with respect to token t is ratio · ∇logp_t.

    * `token`: π(a_t)/π_old(a_t). Ignores that the prefix was sampled by the old policy.
    * `sequence`: the geometric mean over the row, exp(mean_t log ratio_t), the same for all tokens (GSPO).
    * `sequence_sum`: the product over the row, the true weight of the whole completion; unbiased, large variance.

    At the sequence levels the value is the row's and the gradient is passed through each token's own
    log-probability, so that per-token weights keep their meaning ("GSPO-token").

    Args:
        logp_BT: log-probabilities of the sampled tokens under the policy in training, nats, shape (B, T).
        proximal_logp_BT: log-probabilities before the update, or of the sampler, a constant, shape (B, T).
        mask_BT: bool (B, T), the sampled tokens.
        level: token, sequence or sequence_sum.

    Source: PPO, Schulman et al. 2017 (arXiv 1707.06347); GSPO, Zheng et al. 2025 (arXiv 2507.18071).
    """
    log_ratio_BT = logp_BT - proximal_logp_BT
    if level == "token":
        return log_ratio_BT.exp()
    row_B1 = masked_sum(log_ratio_BT, mask_BT, 1).unsqueeze(1)
    if level == "sequence":
        row_B1 = row_B1 / mask_BT.sum(1, keepdim=True).clamp(min=1)
    elif level != "sequence_sum":
        raise ValueError(f"unknown importance_sampling_level {level!r}; use token, sequence or sequence_sum.")
    return row_B1.detach().exp() * (logp_BT - logp_BT.detach()).exp()


def sampler_correction(
    logp_BT: Tensor, behavior_logp_BT: Tensor, mask_BT: Tensor, mode: str, low: float | None, high: float | None
) -> tuple[Tensor, Tensor]:
    """π_trainer/π_sampler of what was sampled, bounded; and where the bound was met. Both (B, T), no gradient.

    An inference engine and a trainer with the same weights give a token different probabilities (other kernels, other
    precision), so even fresh data come from another policy; this is their importance weight.

    * `token_truncate`, `sequence_truncate`: a ratio over `high` counts as `high`, one under `low` as `low`.
    * `token_mask`, `sequence_mask`: a token (a completion) whose ratio is outside [low, high] gets 0.
    * `sequence_binary_kl`: tokens have their own ratios, as they are; a completion gets 0 where the mean over tokens
      of KL(sampler || trainer) between this token and any other is above `high`.

    At the sequence level the ratio is the product over the row's tokens, the weight of the whole completion.

    Args:
        logp_BT: log-probabilities under the trainer at the time of sampling, nats, shape (B, T).
        behavior_logp_BT: those that the sampler reports for the same tokens, shape (B, T).
        mask_BT: bool (B, T), the sampled tokens.
        mode: one of the words above.
        low: lower bound of the ratio; None = no bound.
        high: upper bound; None = no bound.

    Bias: none without bounds at the sequence level; a bound takes out what would make the variance large.
    Source: Yao et al. 2025 (truncated, "Your efficient RL framework secretly brings you off-policy RL training"); Liu
    et al. 2025 (masked); FlashREINFORCE 2026 (sequence_binary_kl); the other names are TRL 1.16's.
    """
    level, _, bound = mode.partition("_")
    if (
        level not in ("token", "sequence")
        or bound not in ("truncate", "mask", "binary_kl")
        or mode == "token_binary_kl"
    ):
        raise ValueError(
            f"vllm_importance_sampling_mode cannot be {mode!r}; it is token_truncate, token_mask, sequence_truncate, "
            "sequence_mask or sequence_binary_kl."
        )
    difference_BT = torch.where(mask_BT, logp_BT - behavior_logp_BT, torch.zeros_like(logp_BT)).detach()
    if bound == "binary_kl":
        divergence_BT = _binary_kl(logp_BT.detach(), behavior_logp_BT)
        mean_B1 = masked_sum(divergence_BT, mask_BT, 1).unsqueeze(1) / mask_BT.sum(1, keepdim=True).clamp(min=1)
        outside_BT = (mean_B1 > (math.inf if high is None else high)).expand_as(mask_BT)
        return difference_BT.masked_fill(outside_BT, -math.inf).exp(), outside_BT
    if level == "sequence":
        difference_BT = difference_BT.sum(1, keepdim=True).expand_as(difference_BT)
    ratio_BT = difference_BT.exp()
    least, most = 0.0 if low is None else low, math.inf if high is None else high
    outside_BT = (ratio_BT < least) | (ratio_BT > most)
    held_BT = torch.zeros_like(ratio_BT) if bound == "mask" else ratio_BT.clamp(min=least, max=most)
    return torch.where(outside_BT, held_BT, ratio_BT), outside_BT


def _binary_kl(logp_BT: Tensor, behavior_logp_BT: Tensor) -> Tensor:
    """KL(sampler || trainer) between the sampled token and any other, in nats, (B, T); see `surrogates`."""
    p_BT, q_BT = (x.exp().clamp(_LEAST, 1 - _LEAST) for x in (behavior_logp_BT, logp_BT))
    return p_BT * (p_BT / q_BT).log() + (1 - p_BT) * ((1 - p_BT) / (1 - q_BT)).log()


def has_left(logp_BT: Tensor, behavior_logp_BT: Tensor, mask_BT: Tensor, threshold: float) -> Tensor:
    """True on rows whose mean log π_sampler - log π over tokens is above `threshold` nats, (B, 1).

    The mean estimates the KL from the sampler to the present policy. Dropping such rows where their weight is
    negative keeps completions that the policy would no longer give from being pushed further down.

    Args:
        logp_BT: log-probabilities of the sampled tokens under the policy in training, nats, shape (B, T).
        behavior_logp_BT: log-probabilities by the sampler, nats, shape (B, T).
        mask_BT: bool (B, T), the sampled tokens.
        threshold: nats for each token, > 0.

    Source: DeepSeek-V3.2 2025 (arXiv 2512.02556).
    """
    gap_B1 = masked_sum(behavior_logp_BT - logp_BT.detach(), mask_BT, 1).unsqueeze(1)
    return gap_B1 / mask_BT.sum(1, keepdim=True).clamp(min=1) > threshold


def clip_range(ratio: Tensor, epsilon: float, epsilon_high: float | None = None) -> Tensor:
    """The ratio held inside [1 - epsilon, 1 + epsilon_high].

    Args:
        ratio: importance ratios, > 0, any shape.
        epsilon: lower width, > 0.
        epsilon_high: upper width, > 0; None = `epsilon`.
    """
    return torch.clamp(ratio, 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
