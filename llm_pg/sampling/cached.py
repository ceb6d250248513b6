"""Decoders for models whose attention is special, or that have more than attention: through the model's own cache, or
without any.

`CacheDecoder` lets the model make its cache: keys, windows of keys, states of convolutions and recurrences, whatever it
has. A prompt is computed once and its part of the cache copied to its rows. `WholeRowDecoder` needs no cache and
computes every row anew for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import to_device
from ..model.cache import CachedForward

CUT_AT = 64  # columns that no row needs any more are cut from the cache when there are so many


@dataclass
class _Computed:
    """Rows in a cache, right-aligned; mask_RW: which columns a row has; logits_RV after its last token."""

    cache: Any
    mask_RW: Tensor
    logits_RV: Tensor


class CacheDecoder:
    """Rows through the model's own forward and cache.

    Args:
        model: of transformers. forward: of it, or of a model of the same architecture.
        pad_id: is before shorter rows.
        pads_prompts: prompts of different lengths are computed together, shorter ones with masked tokens before them;
            False = those of one length at a time, for layers that such tokens would leave a trace in.
        masks_steps: a step is given the mask of all columns; False = for models without keys, which have no use for it.
    """

    def __init__(
        self, model: Any, forward: CachedForward, pad_id: int, *, pads_prompts: bool = True, masks_steps: bool = True
    ) -> None:
        self.model, self.forward, self.rows, self.pad_id = model, forward, forward.rows, pad_id
        self.device = model.device
        self.pads_prompts, self.masks_steps = pads_prompts, masks_steps

    def prefill(self, prompts_R: Sequence[tuple[int, ...]]) -> Tensor:
        """See `Decoder`."""
        made, row_R = self._compute(prompts_R)
        if len(made.mask_RW) < len(prompts_R):
            self.rows.select(made.cache, row_R)
        self.cache, self.mask_RW = made.cache, made.mask_RW[row_R]
        self.position_R = self.mask_RW.sum(1) - 1
        return made.logits_RV[row_R]

    def refill(self, slot_N: Tensor, prompts_N: Sequence[tuple[int, ...]]) -> Tensor:
        """The rows `slot_N` begin anew, each after its prompt; logits after those: (N, V)."""
        made, row_N = self._compute(prompts_N)
        num_rows = len(self.mask_RW)
        joined = self._joined(_Computed(self.cache, self.mask_RW, made.logits_RV[:0]), made)
        index_R = torch.arange(num_rows, device=self.device)
        index_R[to_device(slot_N, self.device)] = num_rows + row_N
        self.rows.select(joined.cache, index_R)
        self.cache, self.mask_RW = joined.cache, joined.mask_RW[index_R]
        self.position_R = self.mask_RW.sum(1) - 1
        self._cut()
        return made.logits_RV[row_N]

    def step(self, next_R: Tensor, depth_R: Tensor) -> Tensor:
        """See `Decoder`."""
        self.mask_RW = F.pad(self.mask_RW, (0, 1), value=1)
        self.position_R = self.position_R + 1
        mask = self.mask_RW if self.masks_steps else None
        out, self.cache = self.forward(next_R.unsqueeze(1), self.position_R.unsqueeze(1), mask, self.cache, self.model)
        logits: Tensor = out.logits[:, -1]
        return logits

    def keep(self, index: Tensor) -> None:
        """See `Decoder`."""
        index = to_device(index, self.device)
        self.rows.select(self.cache, index)
        self.mask_RW, self.position_R = self.mask_RW[index], self.position_R[index]

    def _compute(self, prompts_N: Sequence[tuple[int, ...]]) -> tuple[_Computed, Tensor]:
        """The distinct prompts in a cache of their own, and which of them each has."""
        distinct = list(dict.fromkeys(prompts_N))
        passes = [distinct]
        if not self.pads_prompts:
            lengths = sorted({len(p) for p in distinct})
            passes = [[p for p in distinct if len(p) == n] for n in lengths]
        made = self._pass(passes[0])
        for prompts in passes[1:]:
            made = self._joined(made, self._pass(prompts))
        place = {prompt: i for i, prompt in enumerate(prompt for prompts in passes for prompt in prompts)}
        return made, to_device([place[p] for p in prompts_N], self.device)

    def _pass(self, prompts: Sequence[tuple[int, ...]]) -> _Computed:
        width = max(len(ids) for ids in prompts)
        ids = to_device([[self.pad_id] * (width - len(p)) + list(p) for p in prompts], self.device)
        mask = to_device([[0] * (width - len(p)) + [1] * len(p) for p in prompts], self.device)
        out, cache = self.forward(ids, (mask.cumsum(1) - 1).clamp(min=0), mask, None, self.model)
        return _Computed(cache, mask, out.logits[:, -1])

    def _joined(self, one: _Computed, other: _Computed) -> _Computed:
        width = max(one.mask_RW.shape[1], other.mask_RW.shape[1])
        self.rows.join(one.cache, other.cache, width)
        masks = [F.pad(part.mask_RW, (width - part.mask_RW.shape[1], 0)) for part in (one, other)]
        return _Computed(one.cache, torch.cat(masks), torch.cat([one.logits_RV, other.logits_RV]))

    def _cut(self) -> None:
        """Cuts the columns that no row has."""
        width = self.mask_RW.shape[1]
        new_width = int(self.mask_RW.sum(1).max())
        if width - new_width >= CUT_AT:
            self.rows.cut(self.cache, width, new_width)
            self.mask_RW = self.mask_RW[:, -new_width:]


class WholeRowDecoder:
    """Every row whole for every token, padded on the right, without a cache: right for each causal model, and slow."""

    def __init__(self, model: Any, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id

    def prefill(self, prompts_R: Sequence[tuple[int, ...]]) -> Tensor:
        """See `Decoder`."""
        self.ids_R = [list(prompt) for prompt in prompts_R]
        return self._logits(self.ids_R)

    def refill(self, slot_N: Tensor, prompts_N: Sequence[tuple[int, ...]]) -> Tensor:
        """See `CacheDecoder.refill`."""
        for slot, prompt in zip(slot_N.tolist(), prompts_N, strict=True):
            self.ids_R[slot] = list(prompt)
        return self._logits([list(prompt) for prompt in prompts_N])

    def step(self, next_R: Tensor, depth_R: Tensor) -> Tensor:
        """See `Decoder`."""
        for ids, token in zip(self.ids_R, next_R.tolist(), strict=True):
            ids.append(token)
        return self._logits(self.ids_R)

    def keep(self, index: Tensor) -> None:
        """See `Decoder`."""
        self.ids_R = [self.ids_R[i] for i in index.tolist()]

    def _logits(self, rows: list[list[int]]) -> Tensor:
        device, width = self.model.device, max(len(ids) for ids in rows)
        ids = to_device([row + [self.pad_id] * (width - len(row)) for row in rows], device)
        length_R = to_device([len(row) for row in rows], device)
        mask = (torch.arange(width, device=device) < length_R.unsqueeze(1)).long()
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits[torch.arange(len(rows), device=device), length_R - 1]
