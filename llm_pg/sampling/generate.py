"""The reference engine: transformers' own `generate`, for models that the native sampler cannot drive.

Its random numbers come from torch's global generator, seeded from the rows' keys for each call: repeatable for the same
batch, but a completion depends on the batch it is sampled in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StopStringCriteria

from ..config.engines import ENGINES
from ..estimators.distributions import token_logp
from ..model.attention import core_of, eval_mode, products_in
from ..model.wide import wide_logits
from .protocol import Completions, SamplingParams, joined


class GenerateSampler:
    """Samples by `model.generate`, in batches of `rows_at_once` completions (None = all at once); dtype: see
    `NativeSampler`."""

    capabilities = ENGINES["transformers"]

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        eos_ids: Sequence[int],
        rows_at_once: int | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.tokenizer, self.dtype = model, tokenizer, dtype
        self.pad_id, self.eos_ids, self.rows_at_once = int(tokenizer.pad_token_id), list(eos_ids), rows_at_once

    @torch.no_grad()
    def sample(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, params: SamplingParams, keys_B: Tensor
    ) -> Completions:
        """See `SamplingEngine.sample`."""
        rows = [list(ids) for ids in prompt_ids for _ in range(num_generations)]
        each = self.rows_at_once or len(rows)
        core = core_of(self.model)
        # Arguments that are left out are taken from the model's own settings: a repetition penalty, suppressed tokens.
        before, core.generation_config = core.generation_config, GenerationConfig()
        try:
            with eval_mode(self.model), products_in(self.dtype, self.model), wide_logits(self.model):
                parts = [
                    self._batch(rows[at : at + each], params, keys_B[at : at + each])
                    for at in range(0, len(rows), each)
                ]
        finally:
            core.generation_config = before
        return joined(parts, self.pad_id)

    def _batch(self, rows: list[list[int]], params: SamplingParams, keys_B: Tensor) -> Completions:
        width, device = max(map(len, rows)), self.model.device
        ids = torch.tensor([[self.pad_id] * (width - len(r)) + r for r in rows], device=device)
        attention = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(keys_B.sum()) & 0x7FFFFFFF)
            out = self.model.generate(
                input_ids=ids,
                attention_mask=attention,
                generation_config=self._settings(params),
                tokenizer=self.tokenizer if params.stop else None,
                logits_processor=LogitsProcessorList([_Penalty(params, attention)] if params.reads_context else []),
            )
        tokens_BT = out.sequences[:, width:]
        mask_BT, truncated_B = self._mask(tokens_BT, params)

        def seen_of(step: int, logits: Tensor) -> Tensor | None:
            return _seen(params, out.sequences, attention, step, logits.shape[-1])

        logp_BT = torch.stack(
            [
                token_logp(params.warp(logits, tokens_BT[:, t], seen_of(t, logits)), tokens_BT[:, t])
                for t, logits in enumerate(out.logits)
            ],
            1,
        ).float()
        return Completions(torch.where(mask_BT, tokens_BT, self.pad_id), mask_BT, logp_BT * mask_BT, truncated_B)

    def _settings(self, params: SamplingParams) -> GenerationConfig:
        return GenerationConfig(
            do_sample=not params.greedy,
            temperature=None if params.greedy else params.temperature,
            top_k=None if params.greedy else params.top_k,
            top_p=None if params.greedy else params.top_p,
            min_p=None if params.greedy else params.min_p or None,
            max_new_tokens=params.max_completion_length,
            eos_token_id=self.eos_ids,
            pad_token_id=self.pad_id,
            stop_strings=list(params.stop) or None,
            return_dict_in_generate=True,
            output_logits=True,
        )

    def _mask(self, tokens_BT: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
        """True up to and with each row's first end token (or the token that completes a stop string)."""
        eos = torch.tensor(self.eos_ids, device=tokens_BT.device)
        end_BT = torch.isin(tokens_BT, eos)
        if params.stop:
            criteria = StopStringCriteria(self.tokenizer, list(params.stop))
            for t in range(tokens_BT.shape[1]):
                end_BT[:, t] |= criteria(tokens_BT[:, : t + 1], None)
        before_BT = end_BT.long().cumsum(1) - end_BT.long()
        return before_BT == 0, ~end_BT.any(1)


class _Penalty(LogitsProcessor):
    """The repetition penalty. transformers' own counts the padding before a short prompt as a token that was there."""

    def __init__(self, params: SamplingParams, attention: Tensor) -> None:
        self.params, self.attention = SamplingParams(repetition_penalty=params.repetition_penalty), attention

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.attention.shape[1]
        return self.params.warp(scores, seen=_seen(self.params, input_ids, self.attention, step, scores.shape[-1]))


def _seen(params: SamplingParams, ids: Tensor, attention: Tensor, step: int, vocabulary: int) -> Tensor | None:
    """Which tokens each row has before its token `step`, padding left out; None where nothing depends on it."""
    if not params.reads_context:
        return None
    before = ids[:, : attention.shape[1] + step]
    there = torch.cat([attention.bool(), attention.new_ones(len(ids), step).bool()], 1)
    seen = torch.zeros(len(ids), vocabulary + 1, dtype=torch.bool, device=ids.device)
    return seen.scatter_(1, before.masked_fill(~there, vocabulary), True)[:, :vocabulary]
