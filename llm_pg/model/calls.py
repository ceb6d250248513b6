"""Attention of a packed row, all its calls as one operation with a gradient of its own.

On a CPU by `kernels` where they are, else by products of torch. There queries and keys are taken in the order in which
products read them, heads before tokens, so that nothing is copied into place; what repeated keys (a prompt's, once a
completion) have as gradients is added up once, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.update import Runs, UpdateKernels


class ByKernels(torch.autograd.Function):
    """Softmax attention: (N, heads, d) and twice (N, kv_heads, d) -> (N, heads, d), of one type, by `UpdateKernels`."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, kernels: UpdateKernels, runs: Runs, scale: float
    ) -> Tensor:
        out, log_sum = kernels.attend(query, key, value, runs, scale)
        ctx.save_for_backward(query, key, value, log_sum)
        ctx.kernels, ctx.runs, ctx.scale = kernels, runs, scale
        return out

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, log_sum = ctx.saved_tensors
        slope = slopes[0].contiguous()
        made = ctx.kernels.attend_slopes(query, key, value, slope, ctx.runs, ctx.scale, log_sum)
        return *made, None, None, None


class Call(Protocol):
    """Runs of like length: (rows, q) places of queries, (rows, k) of keys, (rows · q,) which queries are read."""

    query_index: Tensor
    key_index: Tensor
    read: Tensor

    def mask(self, repeats: int, dtype: torch.dtype) -> Tensor:
        """(rows, 1, repeats · q, k), added to the scores."""
        ...


class Places:
    """Where the calls take their rows of numbers, for one number of heads of queries and of keys.

    Args:
        calls: that read each of N tokens once. num_tokens: N.
    """

    def __init__(self, calls: Sequence[Call], num_tokens: int, heads: int, kv_heads: int, device: torch.device) -> None:
        self.queries = torch.cat([_by_head(call.query_index, heads) for call in calls]).to(device)
        self.keys = torch.cat([_by_head(call.key_index, kv_heads) for call in calls]).to(device)
        self.sizes = [(call.query_index.numel() * heads, call.key_index.numel() * kv_heads) for call in calls]
        answers, begin = torch.empty(num_tokens, heads, dtype=torch.int64), 0
        for call in calls:
            rows, q = call.query_index.shape
            place = torch.arange(begin, begin + rows * heads * q).view(rows, heads, q).transpose(1, 2).flatten(0, 1)
            answers[call.query_index.flatten()[call.read]] = place[call.read]
            begin += rows * heads * q
        self.answers = answers.flatten().to(device)


def _by_head(index: Tensor, heads: int) -> Tensor:
    """(rows, n) places of tokens -> (rows · heads · n,) places of their heads, in (tokens · heads)."""
    return (index.unsqueeze(1) * heads + torch.arange(heads).view(1, heads, 1)).flatten()


class CallsTogether(torch.autograd.Function):
    """Softmax attention: (N, heads, d) and twice (N, kv_heads, d) -> (N, heads, d), of the values' type.

    Scores are float32 whatever the type of queries and keys: one of 10 in bfloat16 has its neighbours 0.06 away.

    Args:
        wide: in which both products are computed; None = the scores in float32, the other in the values' type, as all
            products of the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        calls: Sequence[Call],
        places: Places,
        scale: float,
        wide: torch.dtype | None,
    ) -> Tensor:
        shapes, own = (query.shape, key.shape, value.shape), value.dtype
        of_scores = wide or torch.promote_types(own, torch.float32)
        kv_heads, repeats = shapes[1][1], shapes[0][1] // shapes[1][1]
        queries = query.reshape(-1, shapes[0][2]).index_select(0, places.queries).mul_(scale)
        keys, values = (x.reshape(-1, x.shape[2]).index_select(0, places.keys) for x in (key, value))
        weights: list[Tensor] = []
        out = values.new_empty(len(queries), values.shape[1])
        for call, q, k, v, read in _split(calls, places, kv_heads, queries, keys, values, out):
            scores = q.to(of_scores) @ k.to(of_scores).transpose(2, 3)
            weight = scores.add_(call.mask(repeats, of_scores)).softmax(-1)
            weights.append(weight.to(own))
            read.copy_(weights[-1] @ v if wide is None else weight @ v.to(wide))
        ctx.save_for_backward(queries, keys, values, *weights)
        ctx.calls, ctx.places, ctx.scale, ctx.shapes = calls, places, scale, shapes
        return out.index_select(0, places.answers).view(*shapes[0][:2], -1)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, *weights = ctx.saved_tensors
        places, kv_heads = ctx.places, ctx.shapes[1][1]
        slope = values.new_zeros(len(queries), values.shape[1])
        slope.index_copy_(0, places.answers, slopes[0].reshape(-1, values.shape[1]))
        d_queries, d_keys, d_values = (torch.empty_like(x) for x in (queries, keys, values))
        wide = torch.promote_types(values.dtype, torch.float32)
        given = _split(ctx.calls, places, kv_heads, queries, keys, values, slope)
        made = _split(ctx.calls, places, kv_heads, d_queries, d_keys, d_values, slope)
        for (_, q, k, v, d), (_, d_q, d_k, d_v, _), weight in zip(given, made, weights, strict=True):
            torch.matmul(weight.transpose(2, 3), d, out=d_v)
            d_weight = (d @ v.transpose(2, 3)).to(wide)
            d_scores = torch._softmax_backward_data(d_weight, weight.to(wide), -1, wide).to(weight.dtype)
            torch.matmul(d_scores, k, out=d_q)
            torch.matmul(d_scores.transpose(2, 3), q, out=d_k)
        d_query = d_queries.index_select(0, places.answers).mul_(ctx.scale).view(ctx.shapes[0])
        d_key, d_value = (
            torch.ops.aten.embedding_dense_backward(x.to(wide), places.keys, shape[0] * shape[1], -1, False)
            .to(x.dtype)
            .view(shape)
            for x, shape in zip((d_keys, d_values), ctx.shapes[1:], strict=True)
        )
        return d_query, d_key, d_value, None, None, None, None


def _split(
    calls: Sequence[Call], places: Places, kv_heads: int, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor
) -> list[tuple[Call, Tensor, Tensor, Tensor, Tensor]]:
    """Of each call its views: queries and what is read (rows, kv_heads, heads/kv_heads · q, d), keys and values
    (rows, kv_heads, k, d)."""
    found, q_at, k_at = [], 0, 0
    for call, (num_queries, num_keys) in zip(calls, places.sizes, strict=True):
        rows = len(call.query_index)
        of_query, of_key = slice(q_at, q_at + num_queries), slice(k_at, k_at + num_keys)
        q, k, v, o = (
            x[part].view(rows, kv_heads, -1, x.shape[1])
            for x, part in ((queries, of_query), (keys, of_key), (values, of_key), (out, of_query))
        )
        found.append((call, q, k, v, o))
        q_at, k_at = q_at + num_queries, k_at + num_keys
    return found
