"""Log-probabilities from hidden states: the output layer in chunks, so that the logits of a batch are never whole.

Fused kernels of libraries are not used. torch's `linear_cross_entropy` (2.13) gives log-probabilities in the type of
the weights: in bfloat16 0.03 nats off, where these are 0.008, which is a good part of a clipping range. Liger's runs
under Triton alone, where no test of ours could compare it, and only its newest source takes a gradient a token, as a
policy gradient has. Neither knows the temperature nor gives the entropy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..estimators.distributions import entropy, token_logp
from ..kernels.update import TYPES, kernels_for
from .attention import body_of, core_of, eval_mode
from .distribution import Contexts, SamplingParams
from .precision import HALF
from .wide import WideProduct

# Logits of one chunk: 64 MiB in float32.
CHUNK_NUMBERS = 1 << 24
# Probabilities that are kept for the backward pass on a CPU, 256 MiB in float32: those of the first chunks; the logits
# of the others are computed again. A pass of 1,024 tokens at a vocabulary of 49k computes nothing twice.
KEPT_NUMBERS = 1 << 26
# On CUDA a chunk of a large vocabulary would be some hundred rows, and each of them reads the whole layer and adds to
# its whole gradient: there a chunk may take this share of the device's memory, at 8 bytes a logit (its scores, and the
# float32 logits they are made of).
CHUNK_SHARE, BYTES_A_LOGIT = 1 / 32, 8


class _ChunkedLogp(torch.autograd.Function):
    """log softmax(h W^T / τ)[token] and its entropy. The gradient by the logits is g (1[token] - p) / τ: one matrix,
    made in place, where automatic differentiation makes four.

    Args:
        hidden: (M, hidden), of the type in which products are computed. weight: (V, hidden), of its own type.
        rows: of one chunk. kept_rows: those whose probabilities stay for the backward pass, a number of whole chunks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        token: Tensor,
        temperature: float,
        rows: int,
        kept_rows: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        wide, own = torch.promote_types(hidden.dtype, torch.float32), weight.dtype
        logp = torch.empty(len(token), dtype=wide, device=hidden.device)
        nats = torch.zeros_like(logp)
        weight = weight.to(hidden.dtype)
        product = WideProduct(weight) if weight.dtype in HALF else None
        kept: list[Tensor] = []
        kernels = kernels_for(logp)
        for at in range(0, len(token), rows):
            part, keeps = slice(at, at + rows), at < kept_rows
            if kernels is not None:
                logits = _logits(hidden[part], weight, product)
                to = nats[part] if with_entropy else None
                p = kernels.softmax(logits, temperature, token[part], logp[part], to)
                kept += [p] * keeps
                continue
            scores = _log_softmax(hidden[part], weight, temperature, product)
            logp[part] = scores.gather(1, token[part].unsqueeze(1)).squeeze(1)
            if with_entropy or keeps:
                p = scores.exp()
                if with_entropy:
                    nats[part] = -torch.bmm(p.unsqueeze(1), scores.unsqueeze(2)).flatten()
                if keeps:
                    kept.append(p)
        ctx.save_for_backward(hidden, weight, token, *kept)
        ctx.temperature, ctx.rows, ctx.product, ctx.own, ctx.kernels = temperature, rows, product, own, kernels
        ctx.mark_non_differentiable(nats)
        return logp, nats

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, token, *kept = ctx.saved_tensors
        g = gradients[0] / ctx.temperature
        d_hidden = torch.empty_like(hidden)
        d_weight: Tensor | None = None
        for number, at in enumerate(range(0, len(token), ctx.rows)):
            part = slice(at, at + ctx.rows)
            p = kept[number] if number < len(kept) else None
            slope = _slopes(ctx, hidden[part], weight, token[part], g[part], p)
            torch.mm(slope, weight, out=d_hidden[part])
            if not ctx.needs_input_grad[1]:
                continue
            if d_weight is None:
                d_weight = (slope.T @ hidden[part]).to(g.dtype)
            elif weight.dtype == d_weight.dtype:
                d_weight.addmm_(slope.T, hidden[part])
            else:
                d_weight += slope.T @ hidden[part]
        return d_hidden, None if d_weight is None else d_weight.to(ctx.own), None, None, None, None, None


def _slopes(ctx: Any, hidden: Tensor, weight: Tensor, token: Tensor, g: Tensor, p: Tensor | None) -> Tensor:
    """The gradient by the logits, in the type of the weight; p: probabilities, None = they are computed again."""
    if ctx.kernels is not None:
        if p is None:
            logits, logp = _logits(hidden, weight, ctx.product), torch.empty_like(g)
            p = ctx.kernels.softmax(logits, ctx.temperature, token, logp, None)
        slope = ctx.kernels.softmax_slopes(p, token, g.contiguous(), weight.dtype if weight.dtype in TYPES else g.dtype)
        return slope.to(weight.dtype)  # type: ignore[no-any-return]
    if p is None:
        slope = _log_softmax(hidden, weight, ctx.temperature, ctx.product).exp_().mul_(-g.unsqueeze(1))
    else:
        slope = p * -g.unsqueeze(1)
    return slope.scatter_add_(1, token.unsqueeze(1), g.unsqueeze(1)).to(weight.dtype)


def chosen_logp(logits: Tensor, token: Tensor) -> Tensor:
    """log softmax(logits)[token], (N, V) and (N,), to the last bit as `token_scores` computes it without truncation."""
    kernels = kernels_for(logits)
    if kernels is None or logits.dtype is not torch.float32:
        return logits.log_softmax(-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
    logp = torch.empty_like(logits[:, 0])
    kernels.softmax(logits.clone(), 1.0, token, logp, None)
    return logp


def _logits(hidden: Tensor, weight: Tensor, product: WideProduct | None) -> Tensor:
    return hidden @ weight.T if product is None else product(hidden)


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float, product: WideProduct | None) -> Tensor:
    logits = _logits(hidden, weight, product)
    return (logits if temperature == 1.0 else logits.div_(temperature)).log_softmax(-1)


def token_scores(
    hidden_M: Tensor,
    head: Any,
    token_M: Tensor,
    params: SamplingParams,
    *,
    with_entropy: bool,
    entropy_grad: bool,
    contexts: Contexts | None = None,
) -> tuple[Tensor, Tensor]:
    """log π(token) and the entropy of π for M hidden states, under the distribution that `params` samples.

    Args:
        hidden_M: (M, hidden). head: the output layer, logits = head(hidden).
        token_M: int64 (M,). with_entropy: False gives zeros. entropy_grad: whether it carries a gradient.
        contexts: of the tokens; needed where `params.reads_context`.

    Returns:
        Two float tensors (M,), nats, float32 or wider.
    """
    plain = (
        type(head) is torch.nn.Linear and head.bias is None and not (params.truncates_support or params.reads_context)
    )
    if plain and not (with_entropy and entropy_grad):
        weight, rows = head.weight, max(chunk_numbers(hidden_M.device) // head_width(head), 1)
        kind = hidden_M.device.type
        hidden_M = hidden_M.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype)
        rows = min(rows, max(len(token_M), 1))
        kept = _kept_rows(len(token_M), rows, head_width(head), kind) if torch.is_grad_enabled() else 0
        with torch.autocast(kind, enabled=False):
            logp, nats = _ChunkedLogp.apply(hidden_M, weight, token_M, params.temperature, rows, kept, with_entropy)
        return logp, nats

    def part(hidden: Tensor, token: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        logits = head(hidden)
        seen = None if contexts is None else contexts.part(at).seen(logits.shape[-1])
        warped = params.warp(logits, keep=token, seen=seen)
        with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_grad):
            nats = entropy(warped) if with_entropy else torch.zeros_like(warped[:, 0])
        return token_logp(warped, token), nats

    rows = max(CHUNK_NUMBERS // head_width(head), 1)  # small everywhere: automatic differentiation makes many copies
    if len(token_M) <= rows:
        return part(hidden_M, token_M, slice(None))
    pieces = [
        checkpoint(part, hidden_M[at : at + rows], token_M[at : at + rows], slice(at, at + rows), use_reentrant=False)
        for at in range(0, len(token_M), rows)
    ]
    return torch.cat([logp for logp, _ in pieces]), torch.cat([nats for _, nats in pieces])


def _kept_rows(num_rows: int, rows: int, width: int, kind: str) -> int:
    """Rows whose probabilities stay for the backward pass, a number of whole chunks of `rows`."""
    if kind != "cpu":  # memory is scarcer there, and a chunk larger
        return rows if num_rows <= rows else 0
    return num_rows if num_rows <= rows else KEPT_NUMBERS // width // rows * rows


def chunk_numbers(device: torch.device) -> int:
    """Logits computed at a time: by the memory the device has, not by what is free now, so that a run that goes on
    from a checkpoint rounds as it did."""
    if device.type != "cuda":
        return CHUNK_NUMBERS
    total: int = torch.cuda.get_device_properties(device).total_memory
    return max(CHUNK_NUMBERS, int(total * CHUNK_SHARE) // BYTES_A_LOGIT)


def head_width(head: Any) -> int:
    """The vocabulary: rows of the output layer's weight."""
    return int(getattr(head, "out_features", None) or head.weight.shape[0])


LOGITS_TRIED = 50.0  # their size in the trial of the output layer: caps on logits do not show where these are small


def head_is_separate(model: Any) -> bool:
    """Whether logits are just the output embedding of the last hidden state, tried on three tokens.

    Then the head needs to run only where a log-probability is read. Models that cap or scale their logits fail the
    comparison and take the whole forward.
    """
    core = core_of(model)
    head, body = core.get_output_embeddings(), body_of(core)
    if head is None or body is core:
        return False
    ids = torch.arange(3, device=head.weight.device).unsqueeze(0)
    enlarged: list[Tensor] = []

    def enlarge(_module: Any, inputs: tuple[Tensor, ...]) -> Tensor:
        scale = LOGITS_TRIED / split.abs().max().clamp(min=1e-6)
        enlarged.append(inputs[0] * scale.to(inputs[0].dtype))
        return enlarged[0]

    with torch.no_grad(), eval_mode(model):
        split = head(body(input_ids=ids, use_cache=False).last_hidden_state)
        whole = model(input_ids=ids, use_cache=False).logits
        hook = head.register_forward_pre_hook(enlarge)
        try:
            large = model(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()
        split_large = head(enlarged[0])
    return torch.allclose(split.float(), whole.float(), rtol=1e-4, atol=1e-5) and torch.allclose(
        split_large.float(), large.float(), rtol=1e-4, atol=1e-5 * LOGITS_TRIED
    )
