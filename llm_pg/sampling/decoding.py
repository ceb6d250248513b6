"""One token for every row at a time, after prompts whose keys are kept once.

`SharedDecoder` reads each prompt's keys once for all its completions, and allocates the completions' own keys ahead.
For models whose attention is special there is `cached.CacheDecoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..device import to_device
from ..model.attention import core_of, forward
from .lean import LeanDecoder
from .prompts import PromptTable

FIRST_TOKENS = 64  # tokens of a completion allocated at first; doubled whenever they are full


class Decoder(Protocol):
    """Rows in generation. Numbers of rows and of tokens are on the host, so that nothing waits for the device; the
    tokens themselves are there."""

    def prefill(self, prompts_R: Sequence[tuple[int, ...]]) -> Tensor:
        """Begin with a row for each prompt, equal ones computed once; logits after them: (R, V)."""
        ...

    def step(self, next_R: Tensor, depth_R: Tensor) -> Tensor:
        """Logits after one more token of each row, the `depth_R`-th (from 0) of its completion: (R, V)."""
        ...

    def keep(self, index: Tensor) -> None:
        """Go on with the rows `index` alone."""
        ...

    def refill(self, slot_N: Tensor, prompts_N: Sequence[tuple[int, ...]]) -> Tensor:
        """The rows `slot_N` begin anew, each after its prompt; logits after those: (N, V)."""
        ...


class SharedDecoder:
    """Rows that share their prompt's keys and values; a layout of `attention.forward`, or of the lean decoder's layers.

    Each distinct prompt has as many slots as the largest group has rows, so that its keys are read once for all of
    them. The completions' own keys need a mask only where rows are not equally far. A row that has ended may be given
    another prompt, whose keys take the place of a prompt that no row needs any more. The host knows which row has which
    prompt, and how long each is.

    Args:
        refills: whether `refill` will be called; what no row has written yet must then be finite.
    """

    def __init__(self, model: Any, lean: LeanDecoder | None = None, *, refills: bool = False) -> None:
        self.model, self.lean, self.head = model, lean, core_of(model).get_output_embeddings()
        self.device = model.device
        self.allocate = torch.zeros if refills else torch.empty

    def prefill(self, prompts_R: Sequence[tuple[int, ...]]) -> Tensor:
        plain = self.lean is None or self.lean.dtype is None
        self.prompts = PromptTable(self.model, None if plain else self._of_one_type)
        self.own: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values of each row's completion
        self.columns, self.capacity = 0, FIRST_TOKENS
        self.group_R = torch.zeros(len(prompts_R), dtype=torch.int64)
        return self.refill(torch.arange(len(prompts_R)), prompts_R)

    def refill(self, slot_N: Tensor, prompts_N: Sequence[tuple[int, ...]]) -> Tensor:
        """The rows `slot_N` begin anew, each after its prompt; logits after those: (N, V)."""
        others = torch.ones_like(self.group_R, dtype=torch.bool)
        others[slot_N] = False
        group_N = self.prompts.enter(prompts_N, self.group_R[others])
        self.group_R[slot_N] = group_N
        self._mask_prompts()
        self._seat(self.group_R)
        return self.prompts.first_PV[to_device(group_N, self.device)]

    def step(self, next_R: Tensor, depth_R: Tensor) -> Tensor:
        least, most = (int(x) for x in depth_R.aminmax())
        if most >= self.capacity:
            self.capacity *= 2
            self._move(torch.arange(len(next_R)))
        self.columns = most + 1
        there = to_device(torch.stack([depth_R, self.prompts.length_P[self.group_R] + depth_R]), self.device)
        self.depth_R, position_R = there.unbind()
        self.ahead = None
        if least < most:
            self.ahead = torch.arange(self.columns, device=self.device) > self.depth_R.view(-1, 1, 1, 1)
        if self.lean is not None:
            return self.lean.logits(next_R, position_R, self)
        hidden = forward(self.model, next_R.unsqueeze(1), position_R.unsqueeze(1), self)
        logits: Tensor = self.head(hidden[:, -1])
        return logits

    def keep(self, index: Tensor) -> None:
        self._move(index)
        places, group_R = torch.unique(self.group_R[index], return_inverse=True)
        if len(places) < self.num_groups:
            self.prompts.keep(places)
            self._mask_prompts()
        self._seat(group_R)

    def _of_one_type(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Autocast gives values another type than keys; where the lean layers switch it off both are the weights'."""
        return key.to(self.model.dtype), value.to(self.model.dtype)

    def _mask_prompts(self) -> None:
        width = next(iter(self.prompts.pairs.values()))[0].shape[2]
        outside = torch.arange(width) >= self.prompts.length_P.view(-1, 1, 1, 1)
        self.outside = to_device(outside, self.device) if bool(outside.any()) else None

    def _move(self, index: Tensor) -> None:
        """The rows `index` of the completions' keys and values, with room for `capacity` tokens."""
        there = to_device(index, self.device)
        for layer, pair in self.own.items():
            moved = []
            for x in pair:
                new = self._room(x, len(index))
                new[:, :, : self.columns] = x[there, :, : self.columns]
                moved.append(new)
            self.own[layer] = (moved[0], moved[1])

    def _room(self, like: Tensor, rows: int) -> Tensor:
        shape = (rows, like.shape[1], self.capacity, like.shape[3])
        return self.allocate(shape, dtype=like.dtype, device=like.device)

    def _seat(self, group_R: Tensor) -> None:
        """Give each row a slot of its prompt: `slot_R` of each row, and the row of each slot (any row for none)."""
        self.group_R = group_R
        count_P = torch.bincount(group_R, minlength=len(self.prompts.length_P))
        self.num_groups, self.num_slots = len(count_P), int(count_P.max())
        order = torch.argsort(group_R, stable=True)
        every = torch.arange(len(group_R))
        rank = every - (count_P.cumsum(0) - count_P)[group_R[order]]
        slot_R = torch.empty_like(group_R)
        slot_R[order] = group_R[order] * self.num_slots + rank
        row_of_slot = torch.zeros(self.num_groups * self.num_slots, dtype=torch.int64)
        row_of_slot[slot_R] = every
        self.in_order = len(row_of_slot) == len(group_R) and bool((slot_R == every).all())
        self.slot_R, self.row_of_slot = (to_device(x, self.device) for x in (slot_R, row_of_slot))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """See `attention.Layout`; one new token a row: query (R, heads, 1, d)."""
        rows, heads, _, d = query.shape
        kv_heads, columns = key.shape[1], self.columns
        if layer not in self.own:
            self.own[layer] = (self._room(key, rows), self._room(value, rows))
        keys, values = self.own[layer]
        if self.ahead is None:
            keys[:, :, columns - 1], values[:, :, columns - 1] = key[:, :, 0], value[:, :, 0]
        else:
            row_R = torch.arange(rows, device=key.device)
            keys[row_R, :, self.depth_R], values[row_R, :, self.depth_R] = key[:, :, 0], value[:, :, 0]
        prompt_keys, prompt_values = self.prompts.pairs[layer]
        query = query.reshape(rows, kv_heads, heads // kv_heads, d) * (d**-0.5 if scale is None else scale)
        before = self._to_slots(query) @ prompt_keys.transpose(2, 3)
        if self.outside is not None:
            before = before.masked_fill(self.outside, -torch.inf)
        width = before.shape[-1]
        after = query @ keys[:, :, :columns].transpose(2, 3)
        if self.ahead is not None:
            after = after.masked_fill(self.ahead, -torch.inf)
        weight = torch.cat([self._to_rows(before, rows), after], -1).float().softmax(-1).to(query.dtype)
        read = self._to_rows(self._to_slots(weight[..., :width]) @ prompt_values, rows)
        out = read + weight[..., width:] @ values[:, :, :columns]
        return out.reshape(rows, 1, heads, -1)

    def _to_slots(self, x: Tensor) -> Tensor:
        """(R, kv_heads, n, w) -> (P, kv_heads, slots · n, w)."""
        _, kv_heads, n, w = x.shape
        if not self.in_order:
            x = x[self.row_of_slot]
        return (
            x.reshape(-1, self.num_slots, kv_heads, n, w).transpose(1, 2).reshape(-1, kv_heads, self.num_slots * n, w)
        )

    def _to_rows(self, x: Tensor, rows: int) -> Tensor:
        """The way back."""
        groups, kv_heads, n, w = x.shape
        x = x.view(groups, kv_heads, self.num_slots, n // self.num_slots, w).transpose(1, 2)
        x = x.reshape(groups * self.num_slots, kv_heads, n // self.num_slots, w)
        return x if self.in_order else x[self.slot_R]
