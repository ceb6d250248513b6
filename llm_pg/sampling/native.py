"""The in-process sampler: the trainer's own weights through the model's forward and the library's cache.

Each prompt is prefilled once and its cache is expanded to its G completions; rows that have ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StopStringCriteria

from ..estimators.distributions import token_logp
from ..model.attention import eval_mode
from ..model.head import head_is_separate
from ..model.packing import packs_exactly
from .decoding import CacheDecoder, Decoder, SharedDecoder, decodes_leanly
from .lean import LeanDecoder
from .protocol import Completions, SamplingParams, joined
from .random import draw, uniform

# A batch is compacted when this share of its rows has ended: copying the cache has to pay for itself.
COMPACT_BELOW = 0.75


class NativeSampler:
    """Samples from `model` as it stands.

    Args:
        model: a decoder-only transformers model.
        tokenizer: for the pad id and stop strings.
        eos_ids: ids that end a completion.
        rows_at_once: completions in one batch; None = all.
        share_prompts: keep each prompt's keys once for its completions, where a trial shows that it is exact; False =
            always through the library's cache.
        lean: layers in the style of Llama step by step without the library's overhead, where a trial shows that it
            is exact; False = always through the model's own forward.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        eos_ids: Sequence[int],
        rows_at_once: int | None = None,
        *,
        share_prompts: bool = True,
        lean: bool = True,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.pad_id = int(tokenizer.pad_token_id)
        self.eos_ids = tuple(eos_ids)
        self.rows_at_once = rows_at_once
        self.progress: Callable[[int, int], None] | None = None  # told tokens and ends of completions, each token
        self.shares = share_prompts and head_is_separate(model) and packs_exactly(model)
        self.is_lean = lean and self.shares and decodes_leanly(model)

    @torch.no_grad()
    def sample(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, params: SamplingParams, keys_B: Tensor
    ) -> Completions:
        """See `Sampler.sample`."""
        per_batch = max((self.rows_at_once or len(prompt_ids) * num_generations) // num_generations, 1)
        with eval_mode(self.model):
            parts = [
                self._batch(
                    prompt_ids[at : at + per_batch],
                    num_generations,
                    params,
                    keys_B[at * num_generations : (at + per_batch) * num_generations],
                )
                for at in range(0, len(prompt_ids), per_batch)
            ]
        return joined(parts, self.pad_id)

    def _decoder(self) -> Decoder:
        if not self.shares:
            return CacheDecoder(self.model, self.pad_id)
        return SharedDecoder(self.model, LeanDecoder(self.model) if self.is_lean else None)

    def _batch(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, params: SamplingParams, keys_B: Tensor
    ) -> Completions:
        device = self.model.device
        decoder = self._decoder()
        logits = decoder.prefill(prompt_ids, num_generations)
        num_rows, limit = logits.shape[0], params.max_completion_length
        tokens_BT = torch.full((num_rows, limit), self.pad_id, dtype=torch.int64, device=device)
        logp_BT = torch.zeros((num_rows, limit), dtype=torch.float32, device=device)
        length_B = torch.full((num_rows,), limit, dtype=torch.int64, device=device)
        truncated_B = torch.ones(num_rows, dtype=torch.bool, device=device)
        eos = torch.tensor(self.eos_ids, dtype=torch.int64, device=device)
        stops = StopStringCriteria(self.tokenizer, list(params.stop)) if params.stop else None
        row_R = torch.arange(num_rows, device=device)  # the rows still in the batch, and whether each goes on
        live_R = torch.ones(num_rows, dtype=torch.bool, device=device)
        keys_R, num_live = keys_B.to(device), num_rows
        for t in range(limit):
            warped = params.warp(logits)
            next_R = warped.argmax(-1) if params.greedy else draw(warped, uniform(keys_R, t))
            next_R = torch.where(live_R, next_R, self.pad_id)
            tokens_BT[row_R, t] = next_R
            logp_BT[row_R, t] = token_logp(warped, next_R).float() * live_R
            ended_R = live_R & torch.isin(next_R, eos)
            if stops is not None:
                ended_R |= live_R & stops(tokens_BT[row_R, : t + 1], None)
            length_B[row_R[ended_R]] = t + 1
            truncated_B[row_R[ended_R]] = False
            live_R = live_R & ~ended_R
            num_before, num_live = num_live, int(live_R.sum())
            if self.progress is not None:
                self.progress(num_before, num_before - num_live)
            if num_live == 0 or t == limit - 1:
                break
            if num_live < COMPACT_BELOW * live_R.numel():
                kept = live_R.nonzero().squeeze(1)
                decoder.keep(kept)
                row_R, next_R, keys_R, live_R = (x[kept] for x in (row_R, next_R, keys_R, live_R))
            logits = decoder.step(next_R)
        longest = int(length_B.max())
        mask_BT = torch.arange(longest, device=device) < length_B.unsqueeze(1)
        return Completions(tokens_BT[:, :longest], mask_BT, logp_BT[:, :longest] * mask_BT, truncated_B)
