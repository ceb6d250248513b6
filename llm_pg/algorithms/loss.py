"""From log-probabilities to a sum that is a loss: each step's term, times the scale of its reduction.

Each word of an `AlgorithmSpec` has its pure function here:

    SURROGATES      (spec, logp_BT, ratio_BT, batch) -> (B, T)                      each step's term of the loss
    CLIPPED         (spec, logp_BT, ratio_BT, advantage_BT) -> bool (B, T)          steps that clipping meets
    REDUCTIONS      (mask_BT, num_rows, num_tokens, longest) -> (B, T)              what each term is multiplied by

The estimators themselves are in `llm_pg.estimators`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ..estimators.critics import value_loss
from ..estimators.kl import KL_ESTIMATORS
from ..estimators.masked import masked_sum
from ..estimators.ratios import has_left, importance_ratio, sampler_correction
from ..estimators.surrogates import cispo, clipped, gmpo, outside_divergence, reinforce, sapo, vespo
from .batch import Batch
from .spec import AlgorithmSpec


def _clip(spec: AlgorithmSpec, logp_BT: Tensor, ratio_BT: Tensor, batch: Batch) -> Tensor:
    term_BT = clipped(ratio_BT, batch.advantage_BT, spec.epsilon, spec.epsilon_high, spec.delta)
    if spec.importance_sampling_level == "sequence_sum":
        # The ratio is the row's: its value counts once a row, not once a token. The gradient is that of each token.
        term_BT = term_BT - term_BT.detach() * (1 - 1 / batch.mask_BT.sum(1, keepdim=True).clamp(min=1))
    return term_BT


def _cispo(spec: AlgorithmSpec, logp_BT: Tensor, ratio_BT: Tensor, batch: Batch) -> Tensor:
    assert spec.epsilon_high is not None
    return cispo(ratio_BT, logp_BT, batch.advantage_BT, spec.epsilon_high)


def _gmpo(spec: AlgorithmSpec, logp_BT: Tensor, ratio_BT: Tensor, batch: Batch) -> Tensor:
    return gmpo(ratio_BT, batch.mask_BT, batch.advantage_BT, spec.epsilon, _high(spec))


def _dppo(spec: AlgorithmSpec, logp_BT: Tensor, ratio_BT: Tensor, batch: Batch) -> Tensor:
    term_BT = -ratio_BT * batch.advantage_BT
    return term_BT.masked_fill(_has_diverged(spec, logp_BT, ratio_BT, batch.advantage_BT), 0.0)


def _has_diverged(spec: AlgorithmSpec, logp_BT: Tensor, ratio_BT: Tensor, advantage_BT: Tensor) -> Tensor:
    return outside_divergence(logp_BT, ratio_BT, advantage_BT, spec.divergence_type, spec.epsilon, _high(spec))


def _high(spec: AlgorithmSpec) -> float:
    return spec.epsilon if spec.epsilon_high is None else spec.epsilon_high


SURROGATES: dict[str, Callable[[AlgorithmSpec, Tensor, Tensor, Batch], Tensor]] = {
    "reinforce": lambda spec, logp_BT, _, batch: reinforce(logp_BT, batch.advantage_BT),
    "clip": _clip,
    "cispo": _cispo,
    "sapo": lambda spec, _, ratio_BT, batch: sapo(
        ratio_BT, batch.advantage_BT, spec.sapo_temperature_pos, spec.sapo_temperature_neg
    ),
    "gmpo": _gmpo,
    "dppo": _dppo,
    "vespo": lambda spec, logp_BT, ratio_BT, batch: vespo(
        ratio_BT,
        logp_BT,
        batch.advantage_BT,
        (spec.vespo_k_pos, spec.vespo_k_neg),
        (spec.vespo_lambda_pos, spec.vespo_lambda_neg),
    ),
}


def _outside(spec: AlgorithmSpec, _: Tensor, ratio_BT: Tensor, advantage_BT: Tensor) -> Tensor:
    return ((ratio_BT > 1 + _high(spec)) & (advantage_BT > 0)) | ((ratio_BT < 1 - spec.epsilon) & (advantage_BT < 0))


def _outside_in_logs(spec: AlgorithmSpec, _: Tensor, ratio_BT: Tensor, advantage_BT: Tensor) -> Tensor:
    log_BT = ratio_BT.log()
    return ((log_BT > _high(spec)) & (advantage_BT > 0)) | ((log_BT < -spec.epsilon) & (advantage_BT < 0))


# Of reinforce: the steps that clipping would meet.
CLIPPED: dict[str, Callable[[AlgorithmSpec, Tensor, Tensor, Tensor], Tensor]] = {
    "reinforce": _outside,
    "clip": _outside,
    "cispo": lambda spec, _, ratio_BT, advantage_BT: ratio_BT > _high(spec),
    "gmpo": _outside_in_logs,
    "dppo": _has_diverged,
    "sapo": lambda spec, _, ratio_BT, advantage_BT: torch.zeros_like(ratio_BT, dtype=torch.bool),
    "vespo": lambda spec, _, ratio_BT, advantage_BT: torch.zeros_like(ratio_BT, dtype=torch.bool),
}


def _of_all_tokens(mask_BT: Tensor, num_rows: Tensor, num_tokens: Tensor, longest: int | None) -> Tensor:
    return mask_BT / num_tokens


def _of_a_constant(mask_BT: Tensor, num_rows: Tensor, num_tokens: Tensor, longest: int | None) -> Tensor:
    assert longest is not None
    return mask_BT / (num_rows * longest)


REDUCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, int | None], Tensor]] = {
    "sequence_sum": lambda mask_BT, num_rows, *_: mask_BT / num_rows,
    "grpo": lambda mask_BT, num_rows, *_: mask_BT / (mask_BT.sum(1, keepdim=True).clamp(min=1) * num_rows),
    "dapo": _of_all_tokens,
    "bnpo": _of_all_tokens,
    "dr_grpo": _of_a_constant,
}


def policy_loss(
    spec: AlgorithmSpec,
    logp_BT: Tensor,
    batch: Batch,
    *,
    entropy_BT: Tensor | None,
    value_BT: Tensor | None,
    kl_weight: float | None,
    measure: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum over these rows, and sums for the metrics (each adds up over cuts).

    Args:
        spec: the algorithm.
        logp_BT: log π of the sampled actions under the policy in training, with its gradient.
        batch: the same rows of what `compute_advantages` returned.
        entropy_BT: token entropies in nats, needed where entropy_coef is not 0.
        value_BT: the critic's present values, needed where the batch has value targets.
        kl_weight: weight of the adaptive penalty that keeps an update to `kl_target`; None = there is none.
        measure: False leaves out the statistics of the ratios, which cost as much as the loss of a small batch.
    """
    mask_BT = batch.mask_BT
    # Junk outside the mask would come back through the gradient of exp, as 0 · inf, though no sum reads it.
    outside_BT = ~mask_BT
    logp_BT = logp_BT.masked_fill(outside_BT, 0.0)
    proximal_logp_BT = (
        logp_BT.detach() if batch.proximal_logp_BT is None else batch.proximal_logp_BT.masked_fill(outside_BT, 0.0)
    )
    ratio_BT = importance_ratio(logp_BT, proximal_logp_BT, mask_BT, spec.importance_sampling_level)
    own_loss = _users_loss(spec, logp_BT, proximal_logp_BT, batch)
    term_BT = torch.zeros_like(logp_BT)
    if own_loss is None:
        term_BT = SURROGATES[spec.surrogate](spec, logp_BT, ratio_BT, batch)
    stats = _ratio_stats(spec, logp_BT, proximal_logp_BT, ratio_BT, batch) if measure else {}
    term_BT, cut_stats = _sampler_corrected(spec, term_BT, logp_BT, proximal_logp_BT, batch)
    stats.update(cut_stats)
    if batch.ref_logp_BT is not None:
        kl_BT = KL_ESTIMATORS[spec.kl_estimator](logp_BT, batch.ref_logp_BT.masked_fill(outside_BT, 0.0))
        if spec.use_bias_correction_kl:
            kl_BT = kl_BT * ratio_BT
        term_BT = term_BT + spec.beta * kl_BT
    if kl_weight is not None:
        # The steps were sampled by the old policy, so k3 with the old one first is an exact KL(old || new).
        term_BT = term_BT + kl_weight * KL_ESTIMATORS["k3"](proximal_logp_BT, logp_BT)
    loss = masked_sum(term_BT * batch.loss_scale_BT, mask_BT)
    if own_loss is not None:
        loss = loss + own_loss
    stats["policy_loss"] = loss.detach()
    if entropy_BT is not None:
        entropy = masked_sum(entropy_BT, mask_BT)
        stats["entropy"] = entropy.detach() / batch.num_tokens
        if batch.entropy_coef:
            every, kept_BT = entropy / batch.num_tokens, batch.bonus_BT
            bonus = every if kept_BT is None else masked_sum(entropy_BT * kept_BT, mask_BT)
            loss = loss - batch.entropy_coef * bonus
    if batch.value_target_BT is not None and value_BT is not None:
        stats["value_loss"], value_term = _critic_loss(spec, value_BT, batch)
        loss = loss + value_term
    return loss, stats


def _critic_loss(spec: AlgorithmSpec, value_BT: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the critic's mean error over the tokens of the batch, for the metrics, and its term of the loss."""
    assert batch.value_target_BT is not None
    error_BT = value_loss(value_BT, batch.value_target_BT, batch.old_value_BT, spec.value_clip)
    error = masked_sum(error_BT, batch.mask_BT) / batch.num_tokens
    return error.detach(), spec.vf_coef * error


def _users_loss(spec: AlgorithmSpec, logp_BT: Tensor, proximal_logp_BT: Tensor, batch: Batch) -> Tensor | None:
    """What the user's function makes of these rows; None where there is none."""
    if spec.loss is None:
        return None
    loss = spec.loss(logp_BT, dataclasses.replace(batch, proximal_logp_BT=proximal_logp_BT))
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(
            f"The loss function of algorithm {spec.name} returned {got}; it must return a scalar, the sum "
            "over its rows of terms times batch.loss_scale_BT. `llm-pg prove --loss FILE:FUNCTION` tries it."
        )
    return loss


def _sampler_corrected(
    spec: AlgorithmSpec, term_BT: Tensor, logp_BT: Tensor, proximal_logp_BT: Tensor, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy term, corrected for a sampler that differs from the policy, and the shares of tokens that this met."""
    mask_BT, stats = batch.mask_BT, {}
    behavior_logp_BT = batch.rollouts.logp_BT.masked_fill(~mask_BT, 0.0)
    if spec.off_policy_mask_threshold is not None:
        left_B1 = has_left(logp_BT, behavior_logp_BT, mask_BT, spec.off_policy_mask_threshold)
        dropped_BT = left_B1 & (batch.advantage_BT < 0)
        term_BT = term_BT.masked_fill(dropped_BT, 0.0)
        stats["off_policy_masked"] = masked_sum(dropped_BT.to(term_BT.dtype), mask_BT) / batch.num_tokens
    if spec.vllm_importance_sampling_correction:
        correction_BT, bounded_BT = sampler_correction(
            proximal_logp_BT,
            behavior_logp_BT,
            mask_BT,
            spec.vllm_importance_sampling_mode,
            spec.vllm_importance_sampling_clip_min,
            spec.vllm_importance_sampling_clip_max,
        )
        term_BT = term_BT * correction_BT
        stats["correction_bounded"] = masked_sum(bounded_BT.to(term_BT.dtype), mask_BT) / batch.num_tokens
    return term_BT, stats


@torch.no_grad()
def _ratio_stats(
    spec: AlgorithmSpec, logp_BT: Tensor, proximal_logp_BT: Tensor, ratio_BT: Tensor, batch: Batch
) -> dict[str, Tensor]:
    n = batch.num_tokens
    change_BT = logp_BT - proximal_logp_BT
    held_BT = CLIPPED[spec.surrogate](spec, logp_BT, ratio_BT, batch.advantage_BT)
    low_BT, high_BT = held_BT & (batch.advantage_BT < 0), held_BT & (batch.advantage_BT > 0)
    behavior_logp_BT = batch.rollouts.logp_BT
    return {
        "clip_fraction": masked_sum(held_BT.to(logp_BT.dtype), batch.mask_BT) / n,
        "clip_ratio/low_mean": masked_sum(low_BT.to(logp_BT.dtype), batch.mask_BT) / n,
        "clip_ratio/high_mean": masked_sum(high_BT.to(logp_BT.dtype), batch.mask_BT) / n,
        "approx_kl": masked_sum(torch.expm1(change_BT) - change_BT, batch.mask_BT) / n,
        "sampler_gap": masked_sum((proximal_logp_BT - behavior_logp_BT).abs(), batch.mask_BT) / n,
    }
