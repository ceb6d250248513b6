"""The host's part of sampling in steps of fixed shapes: rows enter, the host looks now and then who has ended, the grid
shrinks, the memory grows, and what was recorded is kept for the next batch where it is small.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...device import to_device
from ...model.attention import core_of, tolerance
from ...model.head import head_width
from ...model.wide import WideProduct
from ..decoding import SharedDecoder
from ..lean import LeanDecoder, Linear
from ..prompts import compute_prompts
from ..protocol import Completions, SamplingParams
from .graphs import Graphs, NotStatic, OnlyStatic, Record, recorder, stands_whole, state_of
from .step import Bucket, Buffers, Pairs, Step, cast_of
from .weights import Refreshed, use_refreshed

LOOK_EVERY = 8  # tokens between two looks of the host: what has ended goes on for half of them on the mean
COLUMNS = 64  # of the first bucket of keys, doubled whenever they are full; and what widths are multiples of
SHRINK_TO = 0.5  # the grid is made smaller to this share of its rows or less: each shape is a recording
REFILL_AT = 0.125  # prompts that wait enter when this share of the places is free: a prompt alone is a slow pass
KEEP_SHARE = 0.05  # of the device's memory that may stay taken between batches, while the update needs it
KEEP_BYTES = 1 << 30  # the same without such a device
BYTES_A_LOGIT = 32  # of a step's temporaries: logits, their softmax, its sum in float64, copies


class Arena:
    """What outlives a batch: buffers, the lean layers and recordings that stand on them."""

    def __init__(self, model: Any, is_lean: bool, buffers: Buffers, record: Callable[[torch.device], Record]) -> None:
        self.model, self.is_lean, self.buffers, self.record = model, is_lean, buffers, record
        self.lean: LeanDecoder | None = None
        self.refreshed: list[Refreshed] = []
        self.state: Hashable = None
        self.graphs = Graphs(record(model.device))

    def renew(self) -> None:
        """Before a batch: recordings that hold no more are gone, and copies of weights are those of now."""
        cast = cast_of(self.model.device)
        state = (state_of(self.model), cast)
        laid_out = self.lean is not None and _lays_out(self.lean)
        if state == self.state and not laid_out:
            for copy in self.refreshed:
                copy.refresh()
            return
        self.state = state
        self.forget()
        if self.is_lean:
            self.lean = LeanDecoder(self.model)
            self.refreshed = use_refreshed(self.lean, cast) if cast is not None and not _lays_out(self.lean) else []

    def forget(self) -> None:
        self.graphs = Graphs(self.record(self.model.device))


class StaticSampler:
    """Samples through `step.Step`, recorded on a GPU. Tokens and log-probabilities are those of the other decoders.

    Args:
        model, is_lean, eos_ids, pad_id: of the native sampler.
        record: how steps are recorded. keep_bytes: up to which predicted size buffers are allocated for the longest
            completion, and they and the recordings kept for the next batch; larger ones grow by buckets and are given
            back. None = a share of the device's memory.
    """

    def __init__(
        self, model: Any, is_lean: bool, eos_ids: Sequence[int], pad_id: int, *,
        record: Callable[[torch.device], Record] = recorder, keep_bytes: int | None = None,
    ) -> None:  # fmt: skip
        self.model, self.is_lean, self.pad_id, self.record = model, is_lean, pad_id, record
        self.eos = torch.tensor(list(eos_ids), dtype=torch.int64, device=model.device)
        self.keep_bytes = _may_stay(model.device) if keep_bytes is None else keep_bytes
        self.arena: Arena | None = None

    def refuses(self, params: SamplingParams, num_generations: int, at_once: int) -> str | None:
        """Why a batch has to take the other way; None = it has not."""
        if params.stop:
            return "stop strings are looked for in text, token by token"
        if params.reads_context:
            return "the repetition penalty depends on the tokens that each row has"
        if at_once < num_generations:
            return f"rollout_batch_size {at_once} is below a group of {num_generations}"
        if not stands_whole(self.model):
            return "weights are sharded, and have no address of their own"
        return None

    @torch.no_grad()
    def sample(
        self, prompts_P: Sequence[tuple[int, ...]], num_generations: int, at_once: int, params: SamplingParams,
        keys_B: Tensor, progress: Callable[[int, int], None] | None = None,
    ) -> Completions:  # fmt: skip
        """A completion for each of `keys_B`; the model is in eval mode. Whole groups, `at_once` rows at most."""
        places = min(at_once // num_generations, len(prompts_P))
        first = compute_prompts(self.model, prompts_P[:places])
        width = _up(max(len(p) for p in prompts_P))
        need = Bucket(places, num_generations, width, _up(params.max_completion_length))
        arena = self.arena_for(need, len(keys_B), params.max_completion_length, first[0])
        batch = StaticBatch(self, arena, need, prompts_P, params, keys_B, progress)
        done = batch.run(first)
        buffers = arena.buffers
        size = self._num_bytes(buffers.capacity, first[0]) + sum(x.weight.nbytes for x in arena.refreshed)
        self.arena = arena if size <= self.keep_bytes else None
        return done

    def arena_for(self, need: Bucket, num_rows: int, limit: int, like: Pairs) -> Arena:
        """The one that is kept, where it is large enough; else a new one, large enough for both where that may stay."""
        kept, self.arena = self.arena, None
        dtype = self._dtype()
        if kept is not None:
            held = kept.buffers
            fits = held.capacity.holds(need) and held.num_rows >= num_rows and held.limit >= limit
            if fits and held.dtype == dtype:
                kept.renew()
                return kept
            both = _both(held.capacity, need)
            if self._num_bytes(both, like) <= self.keep_bytes:
                need, num_rows, limit = both, max(num_rows, held.num_rows), max(limit, held.limit)
            kept = None
        if self._num_bytes(need, like) > self.keep_bytes:
            need = replace(need, columns=min(COLUMNS, need.columns))
        buffers = Buffers(need, num_rows, limit, like, self.model.device, dtype)
        arena = Arena(self.model, self.is_lean, buffers, self.record)
        arena.renew()
        return arena

    def _dtype(self) -> torch.dtype | None:
        """Of keys and values: as autocast would cast them for every product."""
        cast = cast_of(self.model.device)
        return self.model.dtype if cast is not None and self.model.device.type == "cpu" and self.is_lean else cast

    def _num_bytes(self, bucket: Bucket, like: Pairs) -> int:
        head = core_of(self.model).get_output_embeddings()
        return Buffers.num_bytes(bucket, like, self._dtype()) + bucket.rows * head_width(head) * BYTES_A_LOGIT


class StaticBatch:
    """One call: which prompts have entered, and what the host knows of the grid."""

    def __init__(
        self, sampler: StaticSampler, arena: Arena, need: Bucket, prompts_P: Sequence[tuple[int, ...]],
        params: SamplingParams, keys_B: Tensor, progress: Callable[[int, int], None] | None,
    ) -> None:  # fmt: skip
        self.sampler, self.arena, self.buffers = sampler, arena, arena.buffers
        self.prompts_P, self.params, self.progress = prompts_P, params, progress
        self.keys_B = to_device(keys_B, sampler.model.device)
        capacity = self.buffers.capacity
        width = capacity.width if capacity.width <= 2 * need.width else need.width
        self.bucket = replace(need, width=width, columns=min(COLUMNS, capacity.columns))
        self.distribution = replace(params, max_completion_length=1, stop=())
        self.entered = 0
        self.count = [1] * self.bucket.rows
        self.live = [False] * self.bucket.rows

    def run(self, first: tuple[Pairs, Tensor, Tensor]) -> Completions:
        num_prompts, limit = len(self.prompts_P), self.params.max_completion_length
        self.buffers.begin(self.sampler.pad_id, limit)
        self.enter(list(range(self.bucket.places)), first)
        while True:
            self._look()
            slots = self.bucket.slots
            free = [p for p in range(self.bucket.places) if not any(self.live[p * slots : (p + 1) * slots])]
            waiting = num_prompts - self.entered
            if waiting and (len(free) >= REFILL_AT * self.bucket.places or not any(self.live)):
                free = free[:waiting]
                prompts = self.prompts_P[self.entered : self.entered + len(free)]
                self.enter(free, compute_prompts(self.sampler.model, prompts))
                continue
            if not any(self.live):
                return self._completions()
            if not waiting:
                self._shrink()
            counts = [n for n, is_live in zip(self.count, self.live, strict=True) if is_live]
            steps = min(LOOK_EVERY, limit - min(counts))
            self._columns(min(max(counts) - 1 + steps, limit))
            step = self.arena.graphs.run((self.bucket, self.distribution), self.step)
            for _ in range(steps):
                step()

    def step(self) -> Step:
        of = self.sampler
        return Step(of.model, self.arena.lean, self.buffers, self.bucket, self.distribution, of.eos, of.pad_id)

    def enter(self, places: list[int], computed: tuple[Pairs, Tensor, Tensor]) -> None:
        """The next prompts begin in these places, with their first tokens."""
        pairs, length_N, logits_NV = computed
        slots, buffers = self.bucket.slots, self.buffers
        rows = [p * slots + s for p in places for s in range(slots)]
        begin = self.entered * slots
        at = buffers.enter(places, rows, pairs, length_N, self.keys_B[begin : begin + len(rows)], begin)
        logits = logits_NV.repeat_interleave(slots, 0)
        taken = buffers.take(logits, at, self.params, self.sampler.eos, self.sampler.pad_id)
        buffers.next_R[at], buffers.count_R[at], buffers.live_R[at] = taken
        for r in rows:
            self.count[r], self.live[r] = 0, True
        self.entered += len(places)

    def _look(self) -> None:
        """Wait for the steps that were asked for, and learn how far each slot is."""
        count, live = self.buffers.status(self.bucket.rows)
        if self.progress is not None:
            sampled = sum(count) - sum(self.count)
            self.progress(sampled, sum(self.live) - sum(live))
        self.count, self.live = count, [bool(x) for x in live]

    def _columns(self, needed: int) -> None:
        """The bucket whose columns hold `needed` tokens."""
        columns = COLUMNS
        while columns < needed:
            columns *= 2
        columns = min(columns, _up(self.params.max_completion_length))
        if columns > self.buffers.capacity.columns:
            self.buffers.grow(columns)
            self.arena.forget()
        self.bucket = replace(self.bucket, columns=columns)

    def _shrink(self) -> None:
        """A smaller grid for the rows that are left, where it is much smaller."""
        slots = self.bucket.slots
        alive = [[r for r in range(p * slots, (p + 1) * slots) if self.live[r]] for p in range(self.bucket.places)]
        kept = [p for p, rows in enumerate(alive) if rows]
        fewer = _halved(max(len(rows) for rows in alive), slots)
        smaller = replace(self.bucket, places=_halved(len(kept), self.bucket.places), slots=fewer)
        if smaller.rows > SHRINK_TO * self.bucket.rows:
            return
        rows = [r for p in kept for r in [*alive[p], *[-1] * (fewer - len(alive[p]))]]
        rows += [-1] * (smaller.rows - len(rows))
        used = max(self.count[r] for r in rows if r >= 0)
        self.buffers.move(rows, [*kept, *[kept[0]] * (smaller.places - len(kept))], used)
        self.count = [self.count[r] if r >= 0 else 1 for r in rows]
        self.live = [r >= 0 for r in rows]
        self.bucket = smaller

    def _completions(self) -> Completions:
        buffers, num_rows = self.buffers, len(self.keys_B)
        length_B = buffers.length_B[:num_rows]
        longest = int(length_B.max())
        tokens_BT, logp_BT = buffers.tokens_BT[:num_rows, :longest], buffers.logp_BT[:num_rows, :longest]
        mask_BT = torch.arange(longest, device=length_B.device) < length_B.unsqueeze(1)
        last_B = tokens_BT.gather(1, length_B.unsqueeze(1) - 1)
        truncated_B = ~(last_B == self.sampler.eos).any(1)
        return Completions(tokens_BT.clone(), mask_BT, logp_BT * mask_BT, truncated_B)


def steps_statically(sampler: StaticSampler) -> str | None:
    """Why `sampler.model` cannot be decoded so; None = its logits are those of `SharedDecoder`, by operations that a
    recording can hold. Tried on two prompts, two completions and two steps."""
    model = sampler.model
    vocabulary = core_of(model).get_input_embeddings().weight.shape[0]
    prompts = [tuple(i % vocabulary for i in ids) for ids in (range(7, 40, 3), range(11, 31, 5))]
    tokens = torch.tensor([[13, 29, 47, 3], [5, 61, 17, 19]], device=model.device) % vocabulary
    plain = SharedDecoder(model, LeanDecoder(model) if sampler.is_lean else None)
    plain.prefill([prompt for prompt in prompts for _ in range(2)])
    params, need = SamplingParams(max_completion_length=8), Bucket(2, 2, COLUMNS, COLUMNS)
    first = compute_prompts(model, prompts)
    arena = sampler.arena_for(need, 4, 8, first[0])
    batch = StaticBatch(sampler, arena, need, prompts, params, torch.arange(4), None)
    arena.buffers.begin(sampler.pad_id, 8)
    batch.enter([0, 1], first)
    step = batch.step()
    for t, next_R in enumerate(tokens):
        step.next_R.copy_(next_R)
        step.count_R.fill_(t + 1)
        expected = plain.step(next_R, torch.full((len(next_R),), t))
        try:
            with OnlyStatic():
                logits = step.logits()
                step()
        except NotStatic as error:
            return str(error)
        # The softmax is in float32 whatever the weights are, and here over more (masked) columns.
        bound = max(tolerance(expected.dtype), tolerance(torch.float32)) * expected.abs().max()
        if not bool((logits - expected).abs().max() <= bound):
            return "its logits differ from those of its own layers"
    return None


def _lays_out(lean: LeanDecoder) -> bool:
    """Whether weights were laid out anew, a copy that is right for one batch."""
    parts = [lean.head, *(x for layer in lean.layers for x in (layer.qkv, layer.out, layer.gate_up, layer.down))]
    return any(isinstance(part, WideProduct) or (isinstance(part, Linear) and bool(part.parts)) for part in parts)


def _may_stay(device: torch.device) -> int:
    if device.type != "cuda":
        return KEEP_BYTES
    return int(KEEP_SHARE * torch.cuda.get_device_properties(device).total_memory)


def _both(a: Bucket, b: Bucket) -> Bucket:
    """The smallest that holds both."""
    places = max(a.places, b.places)
    return Bucket(places, -(-max(a.rows, b.rows) // places), max(a.width, b.width), max(a.columns, b.columns))


def _up(n: int) -> int:
    return -(-n // COLUMNS) * COLUMNS


def _halved(n: int, most: int) -> int:
    """The smallest power of two that is `n` or more, `most` at most."""
    return int(min(1 << (n - 1).bit_length(), most))
