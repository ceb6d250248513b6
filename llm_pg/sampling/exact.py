"""Sampling by the trainer's own numbers: the log-probability of each token is the trainer's, bit for bit.

Two passes over the same weights differ because sums are rounded in another order, and in a 16-bit type one such
difference spreads to all later layers. So nothing here may depend on what is computed together: sampler and trainer go
through the same layers (`model.lean_layers`); oneDNN's products give a row the same numbers whatever is beside it;
attention, whose sums have a length that depends on the layout, is computed in float64 and rounded once. Every row keeps
a copy of its prompt's keys, which costs time where prompts are long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..device import to_device
from ..model.attention import core_of, grouped
from ..model.head import chosen_logp
from ..model.lean_layers import LeanLayers
from ..model.linears import Copies
from ..model.segments import ExactCalls
from .choice import Choice
from .native import NativeSampler
from .prompts import RecordedPrompts
from .protocol import SamplingParams

FIRST_TOKENS = 64  # tokens of a completion allocated at first; doubled whenever they are full
WIDE = torch.float64


class ExactDecoder:
    """See `decoding.Decoder`; a layout of `attention.forward`. Rows do not enter, they only leave.

    Keys and values of a row lie together: its prompt's, with their end at the same place in all rows, then its own.
    """

    def __init__(self, model: Any, copies: Copies) -> None:
        self.layers, self.device = LeanLayers(model, copies), model.device
        self.head = core_of(model).get_output_embeddings()

    def prefill(self, prompts_R: Sequence[tuple[int, ...]]) -> Tensor:
        prompts = list(dict.fromkeys(prompts_R))
        packed = RecordedPrompts(prompts, self.device, dtype=WIDE, way=ExactCalls)
        hidden = self.layers(packed.ids, packed.positions, packed)[0]
        place = {prompt: i for i, prompt in enumerate(prompts)}
        place_R = torch.tensor([place[prompt] for prompt in prompts_R])
        length_P = torch.tensor([len(prompt) for prompt in prompts])
        start_R, self.length_R = (length_P.cumsum(0) - length_P)[place_R], length_P[place_R]
        self.longest = int(length_P.max())
        column_RL = torch.arange(self.longest) - (self.longest - self.length_R).unsqueeze(1)
        source_RL = to_device(start_R.unsqueeze(1) + column_RL.clamp(min=0), self.device)
        self.capacity = FIRST_TOKENS
        self.held = {
            layer: [self._room(x[:, source_RL].transpose(0, 1)) for x in pair] for layer, pair in packed.kept.items()
        }
        last_R = to_device(start_R + self.length_R - 1, self.device)
        return self.head(hidden[last_R])  # type: ignore[no-any-return]

    def step(self, next_R: Tensor, depth_R: Tensor) -> Tensor:
        most = int(depth_R.max())
        if most >= self.capacity:
            self.capacity *= 2
            self.held = {layer: [self._room(x) for x in pair] for layer, pair in self.held.items()}
        self.width = self.longest + most + 1
        column = torch.arange(self.width)
        first_R, last_R = self.longest - self.length_R, self.longest + depth_R
        outside = (column < first_R.unsqueeze(1)) | (column > last_R.unsqueeze(1))
        self.outside = to_device(outside[:, None, None], self.device)
        self.column_R = to_device(last_R, self.device)
        positions = to_device(self.length_R + depth_R, self.device)
        return self.head(self.layers(next_R.unsqueeze(1), positions.unsqueeze(1), self)[:, 0])  # type: ignore[no-any-return]

    def keep(self, index: Tensor) -> None:
        there = to_device(index, self.device)
        self.length_R = self.length_R[index]
        self.held = {layer: [x[there] for x in pair] for layer, pair in self.held.items()}

    def refill(self, slot_N: Tensor, prompts_N: Sequence[tuple[int, ...]]) -> Tensor:
        raise AssertionError("rows do not enter an exact decoder")

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """See `attention.Layout`; one new token a row: query (R, heads, 1, d)."""
        rows, heads, _, d = query.shape
        keys, values = self.held[layer]
        row_R = torch.arange(rows, device=query.device)
        keys[row_R, :, self.column_R], values[row_R, :, self.column_R] = key[:, :, 0].to(WIDE), value[:, :, 0].to(WIDE)
        query = grouped(query, key.shape[1]) * (d**-0.5 if scale is None else scale)
        scores = query.to(WIDE) @ keys[:, :, : self.width].transpose(2, 3)
        weight = scores.masked_fill_(self.outside, -torch.inf).softmax(-1)
        return (weight @ values[:, :, : self.width]).to(value.dtype).view(rows, 1, heads, d)

    def _room(self, x: Tensor) -> Tensor:
        """(R, kv_heads, N, d) with zeros behind it, as many as all tokens need."""
        more = x.new_zeros(*x.shape[:2], self.longest + self.capacity - x.shape[2], x.shape[3])
        return torch.cat([x, more], 2)


class ExactSampler(NativeSampler):
    """Samples from `model` by the trainer's own numbers; `learner.require_exact` checks it at every step.

    Args:
        model: a decoder-only transformers model on a CPU.
        tokenizer: for the pad id and stop strings.
        eos_ids: ids that end a completion.
        rows_at_once: completions in the batch at a time; None = all.
        dtype: of the matrix products, by autocast, as in the update; None = that of the weights.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        eos_ids: Sequence[int],
        rows_at_once: int | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, tokenizer, eos_ids, rows_at_once, dtype=dtype, lean=False, static=False, compiled=False)
        self.copies = Copies()
        self.choice = Choice("exact", lambda model, _: ExactDecoder(model, self.copies), refills=False)

    def sample(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, params: SamplingParams, keys_B: Tensor
    ) -> Any:
        """See `SamplingEngine.sample`."""
        with self.copies.held():
            return super().sample(prompt_ids, num_generations, params, keys_B)

    @staticmethod
    def token_logp(logits: Tensor, tokens: Tensor) -> Tensor:
        """As the trainer's output layer computes it."""
        return chosen_logp(logits, tokens)
