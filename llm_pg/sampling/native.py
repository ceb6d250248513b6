"""The in-process sampler: the trainer's own weights through the model's forward.

Each prompt is computed once for its G completions. Rows that have ended leave the batch, and where not all fit at once
those that wait take their slots. A row's draws hang on its key alone, so none of this changes what is sampled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StopStringCriteria

from ..config.engines import ENGINES
from ..device import to_device
from ..estimators.distributions import token_logp
from ..kernels.build import library
from ..kernels.decoding import Kernels
from ..model.attention import core_of, eval_mode, mixes_types, products_in
from ..model.wide import wide_logits
from .choice import choose
from .protocol import Completions, SamplingParams, joined
from .random import draw, uniform
from .static.batch import StaticSampler, steps_statically

log = logging.getLogger("llm_pg.sampling")

# A batch is compacted when fewer than this share of its rows are left: copying the cache has to pay for itself.
COMPACT_BELOW = 0.75
# Rows that wait enter when this share of the slots is free: a prompt alone is a slow pass.
REFILL_AT = 0.125
EVERY = slice(None)
NO_TOKEN = 2**31 - 1  # what StopStringCriteria takes for an id that matches nothing


class NativeSampler:
    """Samples from `model` with its present weights.

    Args:
        model: a decoder-only transformers model.
        tokenizer: for the pad id and stop strings.
        eos_ids: ids that end a completion.
        rows_at_once: completions in the batch at a time; None = all. Rows that wait enter as others end.
        dtype: of the matrix products, by autocast, as in the update; None = that of the weights.
        share_prompts: keep each prompt's keys once for its completions, where a trial shows that it is exact; False =
            always through the model's cache.
        lean: layers in the style of Llama step by step without the library's overhead, where a trial shows that it
            is exact; False = always through the model's own forward.
        compiled: on a CPU decode and draw by kernels that this machine's compiler makes, where there is one.
        static: decode in steps of fixed shapes, which a GPU records once and replays, where a trial shows that it
            is exact; None = on CUDA. A batch that cannot be decoded so goes the other way, and the log says why.
    """

    capabilities = ENGINES["native"]
    token_logp = staticmethod(token_logp)

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        eos_ids: Sequence[int],
        rows_at_once: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        share_prompts: bool = True,
        lean: bool = True,
        static: bool | None = None,
        compiled: bool = True,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.pad_id = int(tokenizer.pad_token_id)
        self.eos_ids = tuple(eos_ids)
        self.rows_at_once, self.dtype = rows_at_once, dtype
        self.progress: Callable[[int, int], None] | None = None  # is given tokens and ends of completions, each token
        found = library() if compiled and model.device.type == "cpu" else None
        self.kernels = None if found is None else Kernels(found)
        with products_in(dtype if mixes_types(model) else None, model):
            self.choice = choose(model, self.pad_id, share_prompts=share_prompts, lean=lean, kernels=self.kernels)
        self.shares, self.is_lean = self.choice.name in ("lean", "shared"), self.choice.name == "lean"
        if self.choice.name == "whole rows":
            log.warning(
                "%s is decoded by computing each row whole for every token, which is slow; its cache is of no use: %s.",
                type(core_of(model)).__name__,
                self.choice.why,
            )
        self.static: StaticSampler | None = None
        self._static_asked: bool | None = static
        self._said: set[str] = set()
        self._try_static()

    @torch.no_grad()
    def _try_static(self) -> None:
        """Once, where it is asked for: now, or with the first batch after the model came to a GPU."""
        if not (self.model.device.type == "cuda" if self._static_asked is None else self._static_asked):
            return
        self._static_asked = False
        if not self.shares:
            self._say("its attention or its output layer is not that of a plain decoder")
            return
        made = StaticSampler(self.model, self.is_lean, self.eos_ids, self.pad_id)
        with eval_mode(self.model), products_in(self.dtype, self.model), wide_logits(self.model):
            reason = steps_statically(made)
        if reason is None:
            self.static = made
        else:
            self._say(reason)

    def _say(self, reason: str) -> None:
        """Once: why the steps of fixed shapes are not taken."""
        if reason not in self._said:
            self._said.add(reason)
            log.warning("Decoding without steps of fixed shapes (no CUDA graphs): %s.", reason)

    @torch.no_grad()
    def sample(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, params: SamplingParams, keys_B: Tensor
    ) -> Completions:
        """See `SamplingEngine.sample`."""
        prompts_B = [tuple(ids) for ids in prompt_ids for _ in range(num_generations)]
        at_once = min(self.rows_at_once or len(prompts_B), len(prompts_B))
        self._try_static()
        with eval_mode(self.model), products_in(self.dtype, self.model), wide_logits(self.model):
            if self.static is not None:
                reason = self.static.refuses(params, num_generations, at_once)
                if reason is None:
                    prompts_P = prompts_B[::num_generations]
                    return self.static.sample(prompts_P, num_generations, at_once, params, keys_B, self.progress)
                self._say(reason)
            if self.choice.refills:
                return self._rows(prompts_B, at_once, params, keys_B)
            waves = range(0, len(prompts_B), at_once)
            parts = [self._rows(prompts_B[i : i + at_once], at_once, params, keys_B[i : i + at_once]) for i in waves]
        return joined(parts, self.pad_id)

    def _rows(
        self, prompts_B: Sequence[tuple[int, ...]], at_once: int, params: SamplingParams, keys_B: Tensor
    ) -> Completions:
        """A completion for each of `prompts_B`, at most `at_once` at a time."""
        slots = min(at_once, len(prompts_B))
        rows = _Rows(self, params, keys_B, slots, prompts_B if params.reads_context else None)
        decoder = self.choice.make(self.model, slots < len(prompts_B))
        rows.take(decoder.prefill(prompts_B[:slots]))
        entered = slots
        leave_below = 1.0 if getattr(decoder, "keeps_freely", False) else COMPACT_BELOW
        while entered < len(prompts_B) or rows.num_live:
            num_slots = len(rows.row_R)
            if entered < len(prompts_B):
                if num_slots - rows.num_live >= REFILL_AT * num_slots:
                    free = (~rows.live_R).nonzero().squeeze(1)[: len(prompts_B) - entered]
                    upto = entered + len(free)
                    rows.enter(free, entered)
                    rows.take(decoder.refill(free, prompts_B[entered:upto]), free)
                    entered = upto
                    continue
            elif rows.num_live < leave_below * num_slots:
                kept = rows.live_R.nonzero().squeeze(1)
                decoder.keep(kept)
                rows.keep(kept)
            rows.take(decoder.step(rows.next_R, rows.count_R - 1))
        return rows.completions()


class _Rows:
    """What was sampled for all rows, and where those in the batch are: slot r holds row `row_R[r]`, of which
    `count_R[r]` tokens are sampled, the last of them `next_R[r]`.

    The device holds tokens and log-probabilities, the host everything else. It waits for the device once a token, to
    learn which rows have ended.
    """

    def __init__(
        self,
        sampler: NativeSampler,
        params: SamplingParams,
        keys_B: Tensor,
        slots: int,
        prompts_B: Sequence[tuple[int, ...]] | None = None,
    ) -> None:
        device, num_rows, limit = sampler.model.device, len(keys_B), params.max_completion_length
        self.params, self.pad_id, self.progress, self.device = params, sampler.pad_id, sampler.progress, device
        self.kernels = sampler.kernels if device.type == "cpu" else None
        # A slot whose row has ended goes on until it is filled or left; one column more takes what it says.
        self.tokens_BT = torch.full((num_rows, limit + 1), self.pad_id, dtype=torch.int64, device=device)
        self.logp_BT = torch.zeros((num_rows, limit + 1), dtype=torch.float32, device=device)
        self.keys_B = to_device(keys_B, device)
        self.next_R = torch.zeros(slots, dtype=torch.int64, device=device)
        self.eos = to_device(sampler.eos_ids, device, torch.int64)
        self.token_logp = sampler.token_logp
        self.stops = StopStringCriteria(sampler.tokenizer, list(params.stop)) if params.stop else None
        self.length_B = torch.full((num_rows,), limit)
        self.truncated_B = torch.ones(num_rows, dtype=torch.bool)
        self.row_R = torch.arange(slots)
        self.count_R = torch.zeros_like(self.row_R)
        self.live_R = torch.ones(slots, dtype=torch.bool)
        self.num_live = slots
        self.prompts_B = prompts_B  # where the distribution depends on the tokens that were there before
        self.seen_BV: Tensor | None = None  # which they are

    def enter(self, slot_N: Tensor, first: int) -> None:
        """The rows from `first` on begin in the slots `slot_N`."""
        self.row_R[slot_N] = torch.arange(first, first + len(slot_N))
        self.count_R[slot_N], self.live_R[slot_N] = 0, True
        self.num_live += len(slot_N)

    def keep(self, index: Tensor) -> None:
        self.row_R, self.count_R, self.live_R = (x[index] for x in (self.row_R, self.count_R, self.live_R))
        self.next_R = self.next_R[to_device(index, self.device)]

    def take(self, logits: Tensor, slot_N: Tensor | slice = EVERY) -> None:
        """Sample the next token of the rows in `slot_N` from their logits."""
        limit = self.tokens_BT.shape[1] - 1
        row_N, count_N, live_N = self.row_R[slot_N], self.count_R[slot_N], self.live_R[slot_N]
        slot, row, count, live = self._there(slot_N, row_N, count_N, live_N)
        next_N, logp_N = self._drawn(logits, row, count)
        next_N = torch.where(live, next_N, self.pad_id)
        self.tokens_BT[row, count] = next_N
        if self.seen_BV is not None:
            self.seen_BV[row, next_N] = True
        self.logp_BT[row, count] = logp_N.masked_fill(~live, 0.0)
        self.next_R[slot] = next_N
        is_end_N = (next_N.unsqueeze(1) == self.eos).any(1)
        if self.stops is not None:
            is_end_N |= self.stops(self._last(row, count, int(count_N.max()) + 1), None)
        ended_N = live_N & is_end_N.cpu()  # the device is waited for
        count_N = (count_N + 1).clamp(max=limit)
        if bool(ended_N.any()):
            self.length_B[row_N[ended_N]] = count_N[ended_N]
            self.truncated_B[row_N[ended_N]] = False
        sampled = int(live_N.sum())
        self.count_R[slot_N] = count_N
        self.live_R[slot_N] = live_N & ~ended_N & (count_N < limit)
        num_before, self.num_live = self.num_live, int(self.live_R.sum())
        if self.progress is not None:
            self.progress(sampled, num_before - self.num_live)

    def _there(self, slot_N: Tensor | slice, *given: Tensor) -> tuple[Any, Tensor, Tensor, Tensor]:
        """Slots, rows, counts and who is live on the device, by one copy."""
        if self.device.type == "cpu":
            return (slot_N, *given)  # type: ignore[return-value]
        numbers = [x.long() for x in (torch.arange(len(self.row_R))[slot_N], *given)]
        slot, row, count, live = to_device(torch.stack(numbers), self.device)
        return slot, row, count, live.bool()

    def _drawn(self, logits: Tensor, row: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of the rows, the `count`-th of each, and their log-probabilities in float32."""
        uniforms = None if self.params.greedy else uniform(self.keys_B[row], count)
        params = self.params
        kernels = None if logits.dtype == torch.float64 else self.kernels
        if kernels is not None and not (params.truncates_support or params.reads_context):
            return kernels.draw(logits.float().contiguous(), params.temperature, uniforms)
        warped = params.warp(logits, seen=self._seen(row, logits.shape[-1]))
        if kernels is not None:
            return kernels.draw(warped.contiguous(), 1.0, uniforms)
        next_N = warped.argmax(-1) if uniforms is None else draw(warped, uniforms)
        return next_N, self.token_logp(warped, next_N).float()

    def _seen(self, row: Tensor, vocabulary: int) -> Tensor | None:
        """Which tokens are in the rows so far, bool (N, V); None where nothing depends on it."""
        if self.prompts_B is None:
            return None
        if self.seen_BV is None:
            self.seen_BV = torch.zeros(len(self.prompts_B), vocabulary, dtype=torch.bool, device=self.device)
            for place, prompt in enumerate(self.prompts_B):
                self.seen_BV[place, list(prompt)] = True
        return self.seen_BV[row]

    def _last(self, row: Tensor, count: Tensor, most: int) -> Tensor:
        """The last tokens of each row, up to its token `count`, as many as stop strings can reach. most: tokens that
        any of them has."""
        assert self.stops is not None
        width = min(most, self.stops.maximum_token_len)
        column = count.unsqueeze(1) + torch.arange(1 - width, 1, device=count.device)
        tokens = self.tokens_BT[row.unsqueeze(1), column.clamp(min=0)]
        return tokens.masked_fill(column < 0, NO_TOKEN)

    def completions(self) -> Completions:
        longest = int(self.length_B.max())
        mask_BT = to_device(torch.arange(longest) < self.length_B.unsqueeze(1), self.device)
        truncated_B = to_device(self.truncated_B, self.device)
        return Completions(self.tokens_BT[:, :longest], mask_BT, self.logp_BT[:, :longest] * mask_BT, truncated_B)
