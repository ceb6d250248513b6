"""One token for all rows, in shapes and at addresses that stay: what a CUDA graph can record once and replay.

Rows are in a grid of prompts by slots. Lengths are masks, keys and values are written by index into memory that was
allocated before, and the draw, its log-probability and the test for the end belong to the step: nothing in it waits for
the host. The numbers are those of `decoding.SharedDecoder`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...device import to_device
from ...estimators.distributions import token_logp
from ...model.attention import core_of, forward
from ..lean import LeanDecoder
from ..protocol import SamplingParams
from ..random import draw, uniform

Pairs = Mapping[int, tuple[Tensor, Tensor]]  # keys and values of each layer


@dataclass(frozen=True)
class Bucket:
    """What a step computes, whatever of it is alive.

    places: prompts. slots: rows of each. width: columns of the prompts' keys. columns: of the completions' own.
    """

    places: int
    slots: int
    width: int
    columns: int

    @property
    def rows(self) -> int:
        return self.places * self.slots

    def holds(self, other: Bucket) -> bool:
        return (
            other.places <= self.places
            and other.rows <= self.rows
            and other.width <= self.width
            and other.columns <= self.columns
        )


class Buffers:
    """All that steps read and write beside the weights.

    Slot r holds row `row_R[r]` of the batch (`num_rows` = none), of which `count_R[r]` tokens are sampled, the last of
    them `next_R[r]`. `tokens_BT` and `logp_BT` have a row for what empty slots say, and a column for tokens after
    the last token.

    Args:
        capacity: the largest bucket. num_rows, limit: of the batch at most, completions and tokens of each.
        like: keys and values (any, heads, any, d) of each layer, for their sizes. dtype: of all of them; None = their
            own.
    """

    def __init__(
        self, capacity: Bucket, num_rows: int, limit: int, like: Pairs, device: torch.device, dtype: torch.dtype | None
    ) -> None:
        self.capacity, self.num_rows, self.limit, self.dtype = capacity, num_rows, limit, dtype
        ids: dict[str, Any] = {"dtype": torch.int64, "device": device}
        self.tokens_BT = torch.zeros((num_rows + 1, limit + 1), **ids)
        self.logp_BT = torch.zeros((num_rows + 1, limit + 1), device=device)
        self.length_B = torch.zeros(num_rows + 1, **ids)
        self.row_R, self.keys_R, self.count_R, self.next_R = (torch.zeros(capacity.rows, **ids) for _ in range(4))
        self.live_R = torch.zeros(capacity.rows, dtype=torch.bool, device=device)
        self.length_P = torch.ones(capacity.places, **ids)
        self.last = torch.zeros((), **ids)  # the limit of the batch at hand
        self.index = torch.arange(max(capacity.rows, capacity.width, capacity.columns), device=device)

        def room(count: int, columns: int, x: Tensor) -> Tensor:
            return torch.zeros((count, x.shape[1], columns, x.shape[3]), dtype=dtype or x.dtype, device=device)

        places, width = capacity.places, capacity.width
        self.prompt = {i: (room(places, width, k), room(places, width, v)) for i, (k, v) in like.items()}
        self.own = {
            i: (room(capacity.rows, capacity.columns, k), room(capacity.rows, capacity.columns, v))
            for i, (k, v) in like.items()
        }

    @staticmethod
    def num_bytes(capacity: Bucket, like: Pairs, dtype: torch.dtype | None) -> int:
        """Of keys and values, which are nearly all there is."""
        tokens = capacity.places * capacity.width + capacity.rows * capacity.columns
        each = sum(x.shape[1] * x.shape[3] * (dtype or x.dtype).itemsize for pair in like.values() for x in pair)
        return tokens * each

    def begin(self, pad_id: int, limit: int) -> None:
        """For a new batch: no row anywhere."""
        self.tokens_BT.fill_(pad_id)
        self.logp_BT.zero_()
        self.last.fill_(limit)
        self.live_R.zero_()
        self.count_R.fill_(1)
        self.row_R.fill_(self.num_rows)

    def enter(
        self, places: list[int], slots: list[int], pairs: Pairs, length_N: Tensor, keys_N: Tensor, first: int
    ) -> Tensor:
        """Prompts take `places`, and the rows from `first` on, with `keys_N`, their `slots`, which are returned.

        What a masked column holds is multiplied by 0, so it must be finite: nothing of an earlier row stays.
        """
        device = self.index.device
        place_N, at = to_device(places, device), to_device(slots, device)
        for layer, (key, value) in pairs.items():
            for table, new in zip(self.prompt[layer], (key, value), strict=True):
                table[place_N] = 0
                table[place_N, :, : new.shape[2]] = new.to(table.dtype)
            self.own[layer][1][at] = 0
        self.length_P[place_N] = to_device(length_N, device)
        self.row_R[at] = torch.arange(first, first + len(slots), device=device)
        self.keys_R[at], self.count_R[at], self.live_R[at] = keys_N, 0, True
        return at

    def status(self, rows: int) -> tuple[list[int], list[int]]:
        """Tokens sampled in each of the first slots, and whether it goes on; waits for the device."""
        count_R, live_R = self.count_R[:rows], self.live_R[:rows]
        self.length_B[self.row_R[:rows]] = count_R
        count, live = torch.stack([count_R, live_R.long()]).tolist()
        return count, live

    def move(self, slots: list[int], places: list[int], used: int) -> None:
        """Slot i becomes what slot `slots[i]` was (-1 = empty), and place i what `places[i]` was; of the completions'
        keys the first `used` columns."""
        device, rows = self.index.device, len(slots)
        index, place = to_device(slots, device), to_device(places, device)
        empty, index = index < 0, index.clamp(min=0)
        for layer in self.own:
            for table in self.own[layer]:
                table[:rows, :, :used] = table[index, :, :used]
                table[:rows, :, used:] = 0
            for table in self.prompt[layer]:
                table[: len(places)] = table[place]
        self.length_P[: len(places)] = self.length_P[place]
        for state, fill in (
            (self.row_R, self.num_rows), (self.keys_R, 0), (self.count_R, 1), (self.next_R, 0), (self.live_R, False),
        ):  # fmt: skip
            state[:rows] = state[index].masked_fill(empty, fill)

    def grow(self, columns: int) -> None:
        """Room for `columns` tokens of each completion, at other addresses."""
        self.index = torch.arange(max(len(self.index), columns), device=self.index.device)
        for layer, pair in self.own.items():
            moved = []
            for x in pair:
                new = x.new_zeros((x.shape[0], x.shape[1], columns, x.shape[3]))
                new[:, :, : x.shape[2]] = x
                moved.append(new)
            self.own[layer] = (moved[0], moved[1])
        self.capacity = Bucket(self.capacity.places, self.capacity.slots, self.capacity.width, columns)

    def take(
        self, logits_NV: Tensor, at: slice | Tensor, params: SamplingParams, eos: Tensor, pad_id: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sample the next token of the slots `at` from their logits, and write it down: it, counts and who goes on."""
        row_N, count_N, live_N = self.row_R[at], self.count_R[at], self.live_R[at]
        warped = params.warp(logits_NV)
        next_N = warped.argmax(-1) if params.greedy else draw(warped, uniform(self.keys_R[at], count_N))
        next_N = torch.where(live_N, next_N, pad_id)
        logp_N = token_logp(warped, next_N).float().masked_fill(~live_N, 0.0)
        # A slot whose row has ended writes behind that row's end.
        self.tokens_BT.index_put_((row_N, count_N), next_N)
        self.logp_BT.index_put_((row_N, count_N), logp_N)
        count_N = count_N + live_N
        is_end_N = (next_N.unsqueeze(1) == eos).any(1)  # torch.isin may sort and wait
        return next_N, count_N, live_N & ~is_end_N & (count_N < self.last)


class Step:
    """One more token of all rows of a bucket, from `buffers` into `buffers`.

    Args:
        model, lean: what computes the logits: lean layers, or where None the model's own.
        params: the distribution (its limit and stop strings are not looked at). eos: int64, ids that end a row.
    """

    def __init__(
        self, model: Any, lean: LeanDecoder | None, buffers: Buffers, bucket: Bucket, params: SamplingParams,
        eos: Tensor, pad_id: int,
    ) -> None:  # fmt: skip
        self.model, self.lean, self.head = model, lean, core_of(model).get_output_embeddings()
        self.buffers, self.bucket, self.params, self.eos, self.pad_id = buffers, bucket, params, eos, pad_id
        rows, places = bucket.rows, bucket.places
        self.rows = slice(rows)
        self.count_R, self.next_R, self.live_R = (x[:rows] for x in (buffers.count_R, buffers.next_R, buffers.live_R))
        self.length_P = buffers.length_P[:places]
        self.index_R, self.index_L = buffers.index[:rows], buffers.index[: bucket.width]
        self.index_C = buffers.index[: bucket.columns]
        self.prompt, self.own = (
            {i: (k[:count, :, :columns], v[:count, :, :columns]) for i, (k, v) in held.items()}
            for held, count, columns in ((buffers.prompt, places, bucket.width), (buffers.own, rows, bucket.columns))
        )

    @torch.no_grad()
    def __call__(self) -> None:
        taken = self.buffers.take(self.logits(), self.rows, self.params, self.eos, self.pad_id)
        for buffer, new in zip((self.next_R, self.count_R, self.live_R), taken, strict=True):
            buffer.copy_(new)

    def logits(self) -> Tensor:
        """After the last token of each row: (R, V)."""
        kind, cast = self.next_R.device.type, cast_of(self.next_R.device)
        # Weights cast once and kept would be those of another update.
        keeping = contextlib.nullcontext() if cast is None else torch.autocast(kind, cast, cache_enabled=False)
        with keeping:
            # A slot whose row has ended may are behind what this bucket holds.
            depth_R = (self.count_R - 1).clamp(max=self.bucket.columns - 1)
            length_R = self.length_P.unsqueeze(1).expand(-1, self.bucket.slots).reshape(-1)
            reading = _Reading(self, depth_R)
            if self.lean is not None:
                return self.lean.logits(self.next_R, length_R + depth_R, reading)
            # Of ids some models look for padding, and wait for the answer.
            embedded = core_of(self.model).get_input_embeddings()(self.next_R.unsqueeze(1))
            hidden = forward(self.model, embedded, (length_R + depth_R).unsqueeze(1), reading)
            logits: Tensor = self.head(hidden[:, -1])
            return logits


def cast_of(device: torch.device) -> torch.dtype | None:
    """The type that autocast computes matrix products in there; None = it is off."""
    kind = device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


class _Reading:
    """The attention of one step, a layout of `attention.forward`: the masks of its moment are gone with it."""

    def __init__(self, step: Step, depth_R: Tensor) -> None:
        self.step, self.depth_R = step, depth_R
        self.outside = step.index_L >= step.length_P.view(-1, 1, 1, 1)
        self.ahead = step.index_C > depth_R.view(-1, 1, 1, 1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """See `attention.Layout`; one new token a row: query (R, heads, 1, d)."""
        rows, heads, _, d = query.shape
        kv_heads, places, slots = key.shape[1], self.step.bucket.places, self.step.bucket.slots
        keys, values = self.step.own[layer]
        prompt_keys, prompt_values = self.step.prompt[layer]
        where = (self.step.index_R, slice(None), self.depth_R)
        keys[where] = key[:, :, 0].to(keys.dtype)
        values[where] = value[:, :, 0].to(values.dtype)
        query = query.reshape(rows, kv_heads, heads // kv_heads, d) * (d**-0.5 if scale is None else scale)
        query = query.to(keys.dtype)
        before = _to_places(query, places, slots) @ prompt_keys.transpose(2, 3)
        before = _to_rows(before.masked_fill(self.outside, -torch.inf), slots)
        after = (query @ keys.transpose(2, 3)).masked_fill(self.ahead, -torch.inf)
        weight = torch.cat([before, after], -1).float().softmax(-1).to(values.dtype)
        width = before.shape[-1]
        read = _to_rows(_to_places(weight[..., :width], places, slots) @ prompt_values, slots)
        return (read + weight[..., width:] @ values).reshape(rows, 1, heads, -1)


def _to_places(x: Tensor, places: int, slots: int) -> Tensor:
    """(R, kv_heads, n, w) -> (P, kv_heads, slots · n, w): the rows that read one prompt, together."""
    _, kv_heads, n, w = x.shape
    return x.view(places, slots, kv_heads, n, w).transpose(1, 2).reshape(places, kv_heads, slots * n, w)


def _to_rows(x: Tensor, slots: int) -> Tensor:
    """The way back."""
    places, kv_heads, n, w = x.shape
    x = x.view(places, kv_heads, slots, n // slots, w).transpose(1, 2)
    return x.reshape(places * slots, kv_heads, n // slots, w)
