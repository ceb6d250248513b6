"""The load-balancing loss of a mixture of experts, in parts that add up over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def choices(router_logits: Sequence[Tensor], weight_N: Tensor, top_k: int) -> Tensor:
    """How often each expert is among the `top_k` of a token, summed over layers and tokens.

    Args:
        router_logits: (N, E) of each layer, any float. weight_N: how often each token counts, >= 0. top_k: in [1, E].

    Returns:
        (E,), float32, without a gradient.
    """
    counts = torch.zeros(router_logits[0].shape[-1], device=weight_N.device)
    for logits_NE in router_logits:
        chosen_NK = logits_NE.detach().topk(top_k, dim=-1).indices
        counts.index_add_(0, chosen_NK.flatten(), weight_N.float().repeat_interleave(top_k))
    return counts


def load_balancing(router_logits: Sequence[Tensor], weight_N: Tensor, choices_E: Tensor, total: Tensor) -> Tensor:
    """The part that some tokens have in the load-balancing loss of a batch.

    Of the whole batch it is E · Σ_e f_e P_e, with f_e = choices_e / total, P_e the mean over layers and tokens of the
    router's probability of expert e; top_k where all experts are used alike. f has no gradient, so that given f of the
    whole batch the loss is a sum over its tokens, in whatever pieces it is computed; f of each piece by itself would be
    another loss for each way to cut.

    Bias: none as a loss of the batch; of the expectation over batches it is biased, as a product of two means is.

    Source: Fedus, Zoph and Shazeer 2021, arXiv 2101.03961, equations 4 to 6; pooled over layers and generalised to
    top-k as transformers computes it.

    Args:
        router_logits: (N, E) of each layer, of these tokens. weight_N: how often each counts, >= 0.
        choices_E: `choices` of the whole batch. total: layers times the summed weight of the whole batch, > 0.

    Returns:
        A scalar, float32; summed over all pieces it is the loss of the batch.
    """
    probability_E = torch.zeros_like(choices_E)
    for logits_NE in router_logits:
        probability_E = probability_E + (logits_NE.float().softmax(-1) * weight_N.float().unsqueeze(1)).sum(0)
    return len(choices_E) * (choices_E / total * probability_E / total).sum()
