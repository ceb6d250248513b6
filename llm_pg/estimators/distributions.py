"""From logits to the distribution that is really sampled, its log-probabilities and its entropy.

What is sampled is what is trained: the sampler and the trainer call the same `warp_logits`, so temperature and
truncation (top-k, top-p, min-p) enter the trained log-probability. All results are float32 or wider.
"""

import math

import torch
from torch import Tensor


def warp_logits(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    keep: Tensor | None = None,
    repetition_penalty: float = 1.0,
    seen: Tensor | None = None,
) -> Tensor:
    """Logits of the distribution that is sampled: those of tokens that were there before are lowered, then all are
    divided by the temperature, then cut to a support.

    The filters apply in the order of transformers' `generate`: top-k, top-p on what is left, min-p. The support is
    a constant of the gradient (it changes only where two probabilities tie).

    Args:
        logits: (..., V), any real dtype; computed in float32 at least.
        temperature: > 0.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: in (0, 1]; keep the smallest set of most probable tokens whose mass reaches `top_p`.
        min_p: in [0, 1); keep tokens with at least `min_p` times the largest probability.
        keep: (...,) ids that stay in the support whatever the filters say. The trainer passes the sampled token, so
            that a token at the edge of the support cannot get log-probability -inf from rounding or from an update.
        repetition_penalty: > 0; positive logits of seen tokens are divided by it, negative ones multiplied. 1 = none.
        seen: bool (..., V), tokens of the prompt and of the completion so far; needed where there is a penalty.

    Returns:
        (..., V) float logits, -inf outside the support.

    Source: top-p, Holtzman et al. 2020 (arXiv 1904.09751); min-p, Nguyen et al. 2024 (arXiv 2407.01082); repetition
    penalty, Keskar et al. 2019 (arXiv 1909.05858), as in transformers.
    """
    x = logits if logits.dtype == torch.float64 else logits.float()
    if repetition_penalty != 1.0:
        assert seen is not None
        x = torch.where(seen, torch.where(x < 0, x * repetition_penalty, x / repetition_penalty), x)
    if temperature != 1.0:
        x = x / temperature
    if not (top_k or top_p < 1.0 or min_p):
        return x
    with torch.no_grad():
        outside = torch.zeros_like(x, dtype=torch.bool)
        if top_k and top_k < x.shape[-1]:
            outside |= x < x.topk(top_k, dim=-1).values[..., -1:]
        if top_p < 1.0:
            ordered, index = x.masked_fill(outside, -torch.inf).sort(dim=-1, descending=True)
            mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            outside |= torch.zeros_like(outside).scatter(-1, index, mass_before >= top_p)
        if min_p:
            logp = x.masked_fill(outside, -torch.inf).log_softmax(-1)
            outside |= logp < logp.max(-1, keepdim=True).values + math.log(min_p)
        if keep is not None:
            outside.scatter_(-1, keep.unsqueeze(-1), False)
    return x.masked_fill(outside, -torch.inf)


def token_logp(logits: Tensor, tokens: Tensor) -> Tensor:
    """log π(token) under softmax(`logits`), nats, shape (...,).

    Args:
        logits: real numbers, shape (..., V).
        tokens: int64 ids, shape (...,).
    """
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(`logits`) in nats, shape (...,); tokens outside the support (-inf) count as 0.

    Args:
        logits: real numbers, shape (..., V).
    """
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)


def kl_full(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(ref_logits)) summed over the vocabulary, in nats, shape (...,).

    Args:
        logits: real numbers, shape (..., V).
        ref_logits: real numbers, shape (..., V).
    """
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logp.exp() * (logp - ref_logp).masked_fill(logp == -torch.inf, 0.0)).sum(-1)


def gaussian_logp(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(x; mean, std²) of independent coordinates, summed over the last axis, natural logarithm, shape (...,).

    Args:
        x: where, shape (..., A).
        mean: shape (..., A).
        log_std: log σ, shape (..., A).
    """
    z = (x - mean) * (-log_std).exp()
    return (-0.5 * z * z - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Differential entropy of independent coordinates, Σ (log σ + ½ log 2πe), nats, shape (...,); may be below 0.

    Args:
        log_std: log σ, shape (..., A).
    """
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def tanh_log_jacobian(x: Tensor) -> Tensor:
    """Σ log(1 - tanh(x)²), shape (...,), to be subtracted from log p(x) for that of tanh(x).

    Written as 2(log 2 - x - softplus(-2x)), which does not overflow for large |x|.

    Args:
        x: before the tanh, shape (..., A).
    """
    return (2.0 * (math.log(2.0) - x - torch.nn.functional.softplus(-2.0 * x))).sum(-1)
