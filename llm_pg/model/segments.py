"""Runs of tokens in one packed row, and the first of two ways to attend in it: calls over runs of like length.

Right for a CPU, where a small call with a mask costs little more than its arithmetic. `flex` is the other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import to_device
from ..kernels.update import Runs, UpdateKernels, is_taken, kernels_for
from .attention import grouped
from .calls import ByKernels, CallsTogether, Places

# Segments in one attention call: few enough that sorting them by length leaves little padding, but short ones go
# together until their queries × keys come to this many, where a call costs more than its padding.
SEGMENTS_PER_CALL = 8
CELLS_PER_CALL = 1 << 15
# Queries × keys of a head up to which attention in bfloat16 is written out on a CPU.
CELLS_WRITTEN_OUT = 1 << 16


@dataclass
class Segments:
    """Runs of tokens, each attending to itself causally and to a run before it (its prompt; none for a prompt)."""

    start: list[int]
    length: list[int]
    prefix_start: list[int]
    prefix_length: list[int]

    def add(self, *values: int) -> None:
        """One more run: start, length, prefix_start, prefix_length."""
        for column, value in zip(self.columns(), values, strict=True):
            column.append(value)

    def pick(self, index: Sequence[int]) -> Segments:
        return Segments(*([values[i] for i in index] for values in self.columns()))

    def columns(self) -> tuple[list[int], ...]:
        """The four lists themselves (`dataclasses.astuple` would copy every number)."""
        return self.start, self.length, self.prefix_start, self.prefix_length


class PackedAttention(Protocol):
    """A way to attend in a packed row.

    Attributes:
        special: what else of an attention it computes, by the names that transformers gives them.
        compiled: for the machine it runs on, so that a trial there has to see its backward pass too.
    """

    special: ClassVar[frozenset[str]]
    compiled: ClassVar[bool]

    def __init__(self, segments: Segments, device: torch.device) -> None:
        """segments: together every token of the row once, in its order."""
        ...

    @staticmethod
    def filled(num_tokens: int) -> int:
        """The length that a row of so many tokens has to have; a run that nobody reads fills it up."""
        ...

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        softcap: float | None = None,
        sliding_window: int | None = None,
    ) -> Tensor:
        """(1, heads, N, d), keys and values with their own number of heads -> (1, N, heads, d).

        softcap: c of the scores c·tanh(s/c). sliding_window: a token sees so many tokens, itself the last of them.
        """
        ...


class _SegmentCall:
    """One attention call over segments of like length: where queries and keys come from, and who sees whom."""

    def __init__(self, segments: Segments, device: torch.device) -> None:
        start, length, prefix_start, prefix_length = (torch.tensor(v).unsqueeze(1) for v in segments.columns())
        own = torch.arange(max(segments.length))
        before = torch.arange(max(segments.prefix_length))
        self.query_index = torch.where(own < length, start + own, start)
        prefix_index = torch.where(before < prefix_length, prefix_start + before, start)
        self.key_index = torch.cat([prefix_index, self.query_index], 1)
        self.causal = len(before) == 0
        # Fillers sit after the real tokens, so causality alone keeps them out of what is read.
        seen = torch.cat(
            [
                (before < prefix_length).unsqueeze(1).expand(-1, len(own), -1),
                (own.unsqueeze(1) >= own).expand(len(start), -1, -1),
            ],
            2,
        )
        self.hidden = to_device(~seen.unsqueeze(1), device)
        self.read = (own < length).flatten()
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, wide: torch.dtype | None = None
    ) -> Tensor:
        """(r, heads, q, d), (r, kv_heads, k, d) -> (r, q, heads, d).

        wide: in which it is computed; None = as is quickest.
        """
        rows, heads, n, d = query.shape
        kv_heads = key.shape[1]
        if wide is not None or is_written_out(query, key, value):
            mask = self.mask(heads // kv_heads, wide or torch.promote_types(value.dtype, torch.float32))
            return WrittenOut.apply(query, key, value, mask, d**-0.5 if scale is None else scale, wide)  # type: ignore[no-any-return]
        if self.causal:
            key, value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            grouped(query, kv_heads), key, value, attn_mask=self.mask(heads // kv_heads, query.dtype), scale=scale
        )
        return out.reshape(rows, heads, n, -1).transpose(1, 2)

    def mask(self, repeats: int, dtype: torch.dtype) -> Tensor:
        """See `calls.Call`."""
        if (repeats, dtype) not in self._masks:
            mask = torch.zeros(self.hidden.shape, dtype=dtype, device=self.hidden.device)
            mask.masked_fill_(self.hidden, -torch.inf)
            self._masks[repeats, dtype] = mask.repeat(1, 1, repeats, 1)
        return self._masks[repeats, dtype]


class WrittenOut(torch.autograd.Function):
    """Attention as its two products and a softmax: (r, heads, q, d) and (r, kv_heads, k, d) -> (r, q, heads, d).

    Scores are float32 whatever the type of queries and keys: one of 10 in bfloat16 has its neighbours 0.06 away.

    Args:
        mask: (r, 1, heads/kv_heads · q, k), added to the scores, of their type.
        wide: in which both products are computed; None = the scores in that of the mask, the other in the values' own,
            as all products of the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, wide: torch.dtype | None
    ) -> Tensor:
        with torch.autocast(value.device.type, enabled=False):
            (rows, heads, n, _), own = query.shape, value.dtype
            query = grouped(query, key.shape[1]) * scale
            scores = query.to(mask.dtype) @ key.to(mask.dtype).transpose(2, 3)
            weight = scores.add_(mask).softmax(-1)
            narrow = weight.to(own)
            out = narrow @ value if wide is None else (weight @ value.to(wide)).to(own)
        ctx.save_for_backward(query.to(own), key.to(own), value, narrow)
        ctx.scale = scale
        return out.view(rows, heads, n, -1).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weight = ctx.saved_tensors
        slope = slopes[0].transpose(1, 2)
        shape = slope.shape
        slope = grouped(slope, key.shape[1])
        d_value = weight.transpose(2, 3) @ slope
        wide = torch.promote_types(weight.dtype, torch.float32)
        d_weight = (slope @ value.transpose(2, 3)).to(wide)
        d_scores = torch._softmax_backward_data(d_weight, weight.to(wide), -1, wide).to(weight.dtype)
        d_query = (d_scores @ key).mul_(ctx.scale).view(*shape[:3], -1)
        return d_query, d_scores.transpose(2, 3) @ query, d_value, None, None, None


def is_written_out(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether attention is its two products and a softmax: for short runs in bfloat16 on a CPU torch's kernel takes two
    to four times as long, most of it in the backward pass."""
    if query.device.type != "cpu" or query.shape[2] * key.shape[2] > CELLS_WRITTEN_OUT:
        return False
    products = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else value.dtype
    return products is torch.bfloat16


class MaskedCalls:
    """Several calls of scaled dot product attention, each over runs of like length behind their prompts."""

    special: ClassVar[frozenset[str]] = frozenset()
    compiled: ClassVar[bool] = False
    wide: ClassVar[torch.dtype | None] = None

    def __init__(self, segments: Segments, device: torch.device) -> None:
        prompts = [i for i, n in enumerate(segments.prefix_length) if n == 0]
        runs = [i for i, n in enumerate(segments.prefix_length) if n > 0]
        parts = (segments.pick(index) for index in (prompts, runs))
        self._calls = [_SegmentCall(call, device) for part in parts for call in _alike(part)]
        query_index = torch.cat([c.query_index.flatten() for c in self._calls])
        key_index = torch.cat([c.key_index.flatten() for c in self._calls])
        read = torch.cat([c.read for c in self._calls]).nonzero().squeeze(1)
        answer_N = torch.empty(sum(segments.length), dtype=torch.int64)
        answer_N[query_index[read]] = read
        self._places: dict[tuple[int, int], Places] = {}
        self._runs = _runs(segments)
        self._query_index, self._key_index, self._answer_N = (
            to_device(index, device) for index in (query_index, key_index, answer_N)
        )

    @staticmethod
    def filled(num_tokens: int) -> int:
        """See `PackedAttention`: as it is."""
        return num_tokens

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        softcap: float | None = None,
        sliding_window: int | None = None,
    ) -> Tensor:
        """See `PackedAttention`."""
        assert softcap is None
        assert sliding_window is None
        kernels = self._kernels(query, key, value)
        if kernels is not None:
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            out = ByKernels.apply(*(x[0].transpose(0, 1) for x in (query, key, value)), kernels, self._runs, scale)
            return out.unsqueeze(0)  # type: ignore[no-any-return]
        if self._goes_together(query, key, value):
            heads, kv_heads = query.shape[1], key.shape[1]
            if (heads, kv_heads) not in self._places:
                self._places[heads, kv_heads] = Places(self._calls, query.shape[2], heads, kv_heads, query.device)
            out = CallsTogether.apply(
                *(x[0].transpose(0, 1) for x in (query, key, value)),
                self._calls, self._places[heads, kv_heads],
                query.shape[-1] ** -0.5 if scale is None else scale, self.wide,
            )  # fmt: skip
            return out.unsqueeze(0)  # type: ignore[no-any-return]
        # As an embedding: its backward adds whole rows in parallel, that of an index adds number by number.
        queries, keys, values = (
            F.embedding(index, x[0].transpose(0, 1).flatten(1))
            for index, x in ((self._query_index, query), (self._key_index, key), (self._key_index, value))
        )
        # Values may be of another width than keys.
        widths, out, q_at, k_at = (query.shape[-1], key.shape[-1], value.shape[-1]), [], 0, 0
        for call in self._calls:
            (rows, q), k = call.query_index.shape, call.key_index.shape[1]
            parts = (queries[q_at : q_at + rows * q], keys[k_at : k_at + rows * k], values[k_at : k_at + rows * k])
            q_at, k_at = q_at + rows * q, k_at + rows * k
            split = [x.view(rows, -1, x.shape[1] // d, d).transpose(1, 2) for x, d in zip(parts, widths, strict=True)]
            out.append(call(split[0], split[1], split[2], scale, self.wide).reshape(rows * q, -1))
        return F.embedding(self._answer_N, torch.cat(out)).view(1, len(self._answer_N), -1, widths[2])

    def _kernels(self, query: Tensor, key: Tensor, value: Tensor) -> UpdateKernels | None:
        """The kernels, where they compute this attention."""
        if self.wide is not None or self._runs is None or torch.is_autocast_enabled(query.device.type):
            return None
        d, given = query.shape[-1], (query, key, value)
        alike = query.dtype == key.dtype == value.dtype and value.shape[-1] == d and d % 4 == 0
        if not (alike and all(is_taken(x) and x.stride(-1) == 1 for x in given)):
            return None
        return kernels_for()

    def _goes_together(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether all calls are written out, and of one type."""
        if not (query.dtype == key.dtype == value.dtype) or torch.is_autocast_enabled(query.device.type):
            return False
        longest = max(call.query_index.shape[1] * call.key_index.shape[1] for call in self._calls)
        small = longest <= CELLS_WRITTEN_OUT and value.dtype is torch.bfloat16 and query.device.type == "cpu"
        return self.wide is not None or small


class ExactCalls(MaskedCalls):
    """Attention in float64, rounded once: the same numbers however keys are split and padded, for rounding in float64
    is a billion times finer than what it is rounded to."""

    wide: ClassVar[torch.dtype | None] = torch.float64


def _runs(segments: Segments) -> Runs | None:
    """Each prompt with the runs behind it; None where a run reads a part of another."""
    found = dict(zip(segments.start, segments.length, strict=True))
    groups: dict[int, list[tuple[int, int]]] = {}
    for start, length, prefix_start, prefix_length in zip(*segments.columns(), strict=True):
        if prefix_length == 0:
            groups.setdefault(start, []).insert(0, (start, length))
        elif found.get(prefix_start) != prefix_length:
            return None
        else:
            groups.setdefault(prefix_start, []).append((start, length))
    return Runs(list(groups.values()))


def _alike(segments: Segments) -> list[Segments]:
    """Segments of like length, those of one attention call together."""
    order = sorted(range(len(segments.start)), key=lambda i: -segments.length[i])
    calls: list[list[int]] = []
    cells = 0
    for i in order:
        n = segments.length[i]
        if not calls or (len(calls[-1]) >= SEGMENTS_PER_CALL and cells >= CELLS_PER_CALL):
            calls.append([])
            cells = 0
        calls[-1].append(i)
        cells += n * (n + segments.prefix_length[i])
    return [segments.pick(call) for call in calls]
