"""The second way to attend in a packed row: one call of torch's flex_attention over a sparse mask of blocks.

On CUDA it is compiled into one kernel that skips what nobody sees; elsewhere torch runs it uncompiled, with the whole
matrix of scores, which is good for tests alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..device import to_device
from .segments import Segments

BLOCK = 128  # tokens on a side of a block of the mask; the kernel's own tiles divide it


class FlexBlocks:
    """See `segments.PackedAttention`.

    What a token sees is two intervals of the row: of its own run, up to itself, and of its prompt. So the blocks follow
    from the bounds of the runs, and no matrix of N × N is ever made.
    """

    special: ClassVar[frozenset[str]] = frozenset({"softcap", "sliding_window"})
    compiled: ClassVar[bool] = True

    def __init__(self, segments: Segments, device: torch.device) -> None:
        columns = (torch.tensor(column) for column in segments.columns())
        self._start, self._length, self._prefix_start, self._prefix_length = columns
        self._device = device
        self._masks: dict[int | None, BlockMask] = {}

    @staticmethod
    def filled(num_tokens: int) -> int:
        """See `PackedAttention`: whole blocks, at least two, as a compiler takes a size of one for a constant."""
        return max(-(-num_tokens // BLOCK), 2) * BLOCK

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
        if sliding_window not in self._masks:
            self._masks[sliding_window] = self.block_mask(sliding_window)
        kind = query.device.type
        if torch.is_autocast_enabled(kind):  # as scaled dot product attention does: a rotary embedding may have widened
            dtype = torch.get_autocast_dtype(kind)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        out: Tensor = attention_kernel(kind)(
            query,
            key,
            value,
            score_mod=None if softcap is None else _capped(softcap),
            block_mask=self._masks[sliding_window],
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2)

    def block_mask(self, window: int | None = None, block: int = BLOCK) -> BlockMask:
        """Who sees whom, for a row whose length is a multiple of `block`; window: see `PackedAttention`."""
        bounds = self.bounds(window)
        some, every = _blocks(bounds, self._start, block)
        from_own, from_prefix, to_prefix = to_device(bounds, self._device)

        # One function for all rows, with or without windows: the kernel is compiled once.
        def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            own = (k >= from_own[q]) & (k <= q)
            return own | ((k >= from_prefix[q]) & (k < to_prefix[q]))

        mixed = some & ~every
        kv, full_kv, q, full_q = (_listed(x, self._device) for x in (mixed, every, mixed.T, every.T))
        lengths = (bounds.shape[1], bounds.shape[1])
        return BlockMask(lengths, *kv, *full_kv, *q, *full_q, BLOCK_SIZE=(block, block), mask_mod=sees)

    def bounds(self, window: int | None) -> Tensor:
        """For each token: the first that it sees of its own run; the first that it sees of its prompt, and the end of
        that: int32 (3, N)."""
        start, prefix_start, prefix_length = (
            x.repeat_interleave(self._length) for x in (self._start, self._prefix_start, self._prefix_length)
        )
        to_prefix = prefix_start + prefix_length
        if window is None:
            return torch.stack([start, prefix_start, to_prefix]).int()
        here = torch.arange(len(start))
        from_own = torch.maximum(start, here - window + 1)
        from_prefix = torch.maximum(prefix_start, to_prefix + (here - start) - window + 1)
        return torch.stack([from_own, from_prefix.minimum(to_prefix), to_prefix]).int()


def _blocks(bounds: Tensor, start: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Which blocks hold a pair that sees, and which hold nothing else: two bool (blocks, blocks).

    Cut at the runs' and the blocks' ends, the row falls into pieces; within a piece both lower bounds grow with the
    token, so its first and last tell what some and what all of its tokens see.
    """
    num_tokens = bounds.shape[1]
    edge = torch.arange(0, num_tokens + 1, block)
    first = torch.cat([start, edge[:-1]]).unique()
    last = torch.cat([first[1:], edge[-1:]]) - 1
    (low_own, low_prefix, end), (high_own, high_prefix, _) = bounds[:, first].long(), bounds[:, last].long()

    def overlap(begin: Tensor, end: Tensor) -> Tensor:
        return (end[:, None].minimum(edge[1:]) - begin[:, None].maximum(edge[:-1])).clamp(min=0)

    some = (overlap(low_own, last + 1) + overlap(low_prefix, end) > 0).int()
    every = (overlap(high_own, first + 1) + overlap(high_prefix, end) == block).int()
    row = (first // block)[:, None].expand_as(some)
    blank = some.new_zeros(num_tokens // block, num_tokens // block)
    return (
        blank.scatter_reduce(0, row, some, "amax", include_self=False).bool(),
        blank.scatter_reduce(0, row, every, "amin", include_self=False).bool(),
    )


def _listed(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are true, and their columns, the true ones first: int32 (1, 1, n), (1, 1, n, n)."""
    number = to_device(blocks.sum(1)[None, None].int(), device)
    columns = to_device(
        blocks.int().argsort(dim=1, descending=True, stable=True)[None, None].int().contiguous(), device
    )
    torch._dynamo.maybe_mark_dynamic(number, 2)
    torch._dynamo.maybe_mark_dynamic(columns, (2, 3))
    return number, columns


@functools.cache
def attention_kernel(kind: str) -> Any:
    # Rows differ in length from pass to pass, so sizes are symbols: each length would be compiled by itself otherwise,
    # and after a few of them torch would go on without the kernel, which fullgraph makes an error.
    attention: Any = flex_attention
    return torch.compile(attention, dynamic=True, fullgraph=True) if kind == "cuda" else attention


@functools.cache
def _capped(cap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped
