"""One token for every row at a time: two ways to keep what was computed before.

`SharedDecoder` keeps each prompt's keys once for all its completions and reads them once a group, and allocates the
completions' own keys ahead. `CacheDecoder` goes through the library's cache, for models whose attention is special.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from ..model.attention import core_of, eval_mode, forward, tolerance
from ..model.packing import Packed
from .lean import LeanDecoder, NotLlamaStyle

FIRST_TOKENS = 64  # tokens of a completion allocated at first; doubled whenever they are full


class Decoder(Protocol):
    """Rows in generation."""

    def prefill(self, prompt_ids: Sequence[Sequence[int]], num_generations: int) -> Tensor:
        """Logits after each prompt, a row a completion: (P·G, V)."""
        ...

    def step(self, next_R: Tensor) -> Tensor:
        """Logits after one more token of each row: (R, V)."""
        ...

    def keep(self, index: Tensor) -> None:
        """Go on with the rows `index` alone."""
        ...


class CacheDecoder:
    """Left-padded rows through the model's own attention and transformers' DynamicCache."""

    def __init__(self, model: Any, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id

    def prefill(self, prompt_ids: Sequence[Sequence[int]], num_generations: int) -> Tensor:
        device, width = self.model.device, max(len(ids) for ids in prompt_ids)
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in prompt_ids], device=device)
        self.attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompt_ids], device=device)
        positions = (self.attention.cumsum(1) - 1).clamp(min=0)
        self.position = positions[:, -1]
        self.cache = DynamicCache(config=self.model.config)
        logits: Tensor = self._forward(ids, positions, logits_to_keep=1)
        if num_generations > 1:
            self.cache.batch_repeat_interleave(num_generations)
            logits, self.attention, self.position = (
                x.repeat_interleave(num_generations, 0) for x in (logits, self.attention, self.position)
            )
        return logits

    def step(self, next_R: Tensor) -> Tensor:
        self.attention = torch.cat([self.attention, self.attention.new_ones((len(next_R), 1))], 1)
        self.position = self.position + 1
        return self._forward(next_R.unsqueeze(1), self.position.unsqueeze(1))

    def keep(self, index: Tensor) -> None:
        self.cache.batch_select_indices(index)
        self.attention, self.position = self.attention[index], self.position[index]

    def _forward(self, ids: Tensor, positions: Tensor, **options: Any) -> Tensor:
        logits: Tensor = self.model(
            input_ids=ids,
            attention_mask=self.attention,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **options,
        ).logits
        return logits[:, -1]


class _Recorded(Packed):
    """Packed prompts whose keys and values stay."""

    def __init__(self, prompts: Sequence[tuple[int, ...]], device: torch.device) -> None:
        super().__init__(prompts, [()] * len(prompts), device)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        self.kept[layer] = (key[0], value[0])
        return super().attend(layer, query, key, value, scale)


class SharedDecoder:
    """Rows that share their prompt's keys and values; a layout of `attention.forward`, or of the lean decoder's layers.

    Each distinct prompt has as many slots as the largest group has rows, so that its keys are read once for all of
    them; the completions' own keys need no mask, because all rows are equally far.
    """

    def __init__(self, model: Any, lean: LeanDecoder | None = None) -> None:
        self.model, self.lean, self.head = model, lean, core_of(model).get_output_embeddings()

    def prefill(self, prompt_ids: Sequence[Sequence[int]], num_generations: int) -> Tensor:
        device = self.model.device
        prompts = [tuple(p) for p in prompt_ids]
        distinct = list(dict.fromkeys(prompts))
        number = {prompt: i for i, prompt in enumerate(distinct)}
        length_P = torch.tensor([len(p) for p in distinct], device=device)
        start_P = length_P.cumsum(0) - length_P
        packed = _Recorded(distinct, device)
        hidden = forward(self.model, packed.ids, packed.positions, packed)[0]
        column = torch.arange(int(length_P.max()), device=device)
        inside = column < length_P.unsqueeze(1)
        place = torch.where(inside, start_P.unsqueeze(1) + column, start_P.unsqueeze(1))
        # (heads, N, d) -> (P, heads, L, d): prompts of different lengths are padded and masked here alone.
        self.prompt = {
            layer: tuple(x[:, place].transpose(0, 1).contiguous() for x in pair) for layer, pair in packed.kept.items()
        }
        self.outside = None if bool(inside.all()) else ~inside.view(len(distinct), 1, 1, -1)
        group_R = torch.tensor([number[p] for p in prompts], device=device).repeat_interleave(num_generations)
        self.position_R = length_P[group_R] - 1
        self.own: dict[int, tuple[Tensor, Tensor]] = {}
        self.length, self.capacity = 0, FIRST_TOKENS
        self._seat(group_R)
        logits: Tensor = self.head(hidden[start_P + length_P - 1])
        return logits[group_R]

    def step(self, next_R: Tensor) -> Tensor:
        self.position_R = self.position_R + 1
        if self.length == self.capacity:
            self.capacity *= 2
            self._move(torch.arange(len(next_R), device=next_R.device))
        if self.lean is not None:
            logits = self.lean.logits(next_R, self.position_R, self)
        else:
            hidden = forward(self.model, next_R.unsqueeze(1), self.position_R.unsqueeze(1), self)
            logits = self.head(hidden[:, -1])
        self.length += 1
        return logits

    def keep(self, index: Tensor) -> None:
        self.position_R = self.position_R[index]
        self._move(index)
        group_R = self.group_R[index]
        groups, renumbered = torch.unique(group_R, return_inverse=True)
        if len(groups) < self.num_groups:
            self.prompt = {layer: tuple(x[groups] for x in pair) for layer, pair in self.prompt.items()}
            self.outside = None if self.outside is None else self.outside[groups]
        self._seat(renumbered)

    def _move(self, index: Tensor) -> None:
        """The rows `index` of the completions' keys and values, with room for `capacity` tokens."""
        for layer, pair in self.own.items():
            moved = []
            for x in pair:
                new = x.new_empty((len(index), x.shape[1], self.capacity, x.shape[3]))
                new[:, :, : self.length] = x[index, :, : self.length]
                moved.append(new)
            self.own[layer] = (moved[0], moved[1])

    def _seat(self, group_R: Tensor) -> None:
        """Give each row a slot of its prompt: `slot_R` of each row, and the row of each slot (any row for none)."""
        self.group_R = group_R
        count_P = torch.bincount(group_R)
        self.num_groups, self.num_slots = len(count_P), int(count_P.max())
        order = torch.argsort(group_R, stable=True)
        rank = torch.arange(len(group_R), device=group_R.device) - (count_P.cumsum(0) - count_P)[group_R[order]]
        slot_R = torch.empty_like(group_R)
        slot_R[order] = group_R[order] * self.num_slots + rank
        self.slot_R = slot_R
        self.row_of_slot = torch.zeros(self.num_groups * self.num_slots, dtype=torch.int64, device=group_R.device)
        self.row_of_slot[slot_R] = torch.arange(len(group_R), device=group_R.device)
        full = len(self.row_of_slot) == len(group_R)
        self.in_order = full and bool((slot_R == torch.arange(len(slot_R), device=slot_R.device)).all())

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """See `attention.Layout`; one new token a row: query (R, heads, 1, d)."""
        rows, heads, _, d = query.shape
        kv_heads, t = key.shape[1], self.length
        if layer not in self.own:
            shape = (rows, kv_heads, self.capacity, d)
            self.own[layer] = (key.new_empty(shape), value.new_empty(shape))
        keys, values = self.own[layer]
        keys[:, :, t], values[:, :, t] = key[:, :, 0], value[:, :, 0]
        prompt_keys, prompt_values = self.prompt[layer]
        query = query.reshape(rows, kv_heads, heads // kv_heads, d) * (d**-0.5 if scale is None else scale)
        before = self._to_slots(query) @ prompt_keys.transpose(2, 3)
        if self.outside is not None:
            before = before.masked_fill(self.outside, -torch.inf)
        width = before.shape[-1]
        after = query @ keys[:, :, : t + 1].transpose(2, 3)
        weight = torch.cat([self._to_rows(before, rows), after], -1).float().softmax(-1).to(query.dtype)
        read = self._to_rows(self._to_slots(weight[..., :width]) @ prompt_values, rows)
        out = read + weight[..., width:] @ values[:, :, : t + 1]
        return out.reshape(rows, 1, heads, d)

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


@torch.no_grad()
def decodes_leanly(model: Any) -> bool:
    """Whether the lean decoder gives this model's own logits, tried on two prompts, two completions and two steps."""
    vocabulary = core_of(model).get_input_embeddings().weight.shape[0]
    prompts = [[i % vocabulary for i in ids] for ids in (range(7, 40, 3), range(11, 31, 5))]
    tokens = torch.tensor([[13, 29, 47, 3], [5, 61, 17, 19]], device=model.device) % vocabulary
    answers = []
    with eval_mode(model):
        try:
            for lean in (None, LeanDecoder(model)):
                decoder = SharedDecoder(model, lean)
                decoder.prefill(prompts, 2)
                answers.append(torch.stack([decoder.step(next_R) for next_R in tokens]))
        except (NotLlamaStyle, RuntimeError):  # RuntimeError: shapes that do not fit, such as a partial rotation
            return False
    plain, lean_too = answers
    return bool((lean_too - plain).abs().max() <= tolerance(plain.dtype) * plain.abs().max())
