"""A training batch in one row without padding, in which completions of the same prompt share it.

The prompt is computed once, every completion attends to it, and its keys and values collect the gradient of all of
them: the same function of the weights as a row a completion, hence the same gradient. The last token of a completion
is no input, unless the state after it is asked for: nothing else reads what follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rollouts import TextRollouts
from .attention import UnsupportedAttention, core_of, eval_mode, forward, grouped, has_full_attention, tolerance

# Segments in one attention call: few enough that sorting them by length leaves little padding, but short ones go
# together until their queries × keys come to this many, where a call costs more than its padding.
SEGMENTS_PER_CALL = 8
CELLS_PER_CALL = 1 << 15


@dataclass
class _Segments:
    """Runs of tokens, each attending to itself causally and to a run before it (its prompt; none for a prompt)."""

    start: list[int]
    length: list[int]
    prefix_start: list[int]
    prefix_length: list[int]

    def pick(self, index: Sequence[int]) -> _Segments:
        return _Segments(*([values[i] for i in index] for values in self.columns()))

    def columns(self) -> tuple[list[int], ...]:
        """The four lists themselves (`dataclasses.astuple` would copy every number)."""
        return self.start, self.length, self.prefix_start, self.prefix_length


class _Call:
    """One attention call over segments of like length: where queries and keys come from, and who sees whom."""

    def __init__(self, segments: _Segments, device: torch.device) -> None:
        start, length, prefix_start, prefix_length = (
            torch.tensor(v, device=device).unsqueeze(1) for v in segments.columns()
        )
        own = torch.arange(max(segments.length), device=device)
        before = torch.arange(max(segments.prefix_length), device=device)
        self.query_index = torch.where(own < length, start + own, start)
        prefix_index = torch.where(before < prefix_length, prefix_start + before, start)
        self.key_index = torch.cat([prefix_index, self.query_index], 1)
        self.causal = len(before) == 0
        # Fillers sit after the real tokens, so causality alone keeps them out of what is read.
        seen = torch.cat(
            [
                (before < prefix_length).unsqueeze(1).expand(-1, len(own), -1),
                (own.unsqueeze(1) >= own).expand(len(start), -1, -1),
            ],
            2,
        )
        self.hidden = None if self.causal else ~seen.unsqueeze(1)
        self.read = (own < length).flatten()
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """(r, heads, q, d), (r, kv_heads, k, d) -> (r, q, heads, d)."""
        rows, heads, n, d = query.shape
        kv_heads = key.shape[1]
        if self.causal:
            key, value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            grouped(query, kv_heads), key, value, attn_mask=self._mask(heads // kv_heads, query.dtype), scale=scale
        )
        return out.reshape(rows, heads, n, d).transpose(1, 2)

    def _mask(self, repeats: int, dtype: torch.dtype) -> Tensor:
        if (repeats, dtype) not in self._masks:
            assert self.hidden is not None
            mask = torch.zeros(self.hidden.shape, dtype=dtype, device=self.hidden.device)
            mask.masked_fill_(self.hidden, -torch.inf)
            self._masks[repeats, dtype] = mask.repeat(1, 1, repeats, 1)
        return self._masks[repeats, dtype]


class Packed:
    """Rollouts laid out as prompts, then completions, in one row.

    Attributes:
        ids, positions: int64 (1, N).
        place_M: for each sampled token, in row-major order of the mask, the place whose output predicts it; then,
            for each row of `after_B` that is true, that of its last token.

    Args:
        completions_B: what follows each prompt. sampled_B: the places of the sampled tokens in it, of which the last
            token must be one; None = all.
    """

    def __init__(
        self,
        prompt_ids_B: Sequence[tuple[int, ...]],
        completions_B: Sequence[Sequence[int]],
        device: torch.device,
        after_B: Sequence[bool] | None = None,
        sampled_B: Sequence[Sequence[int]] | None = None,
    ) -> None:
        starts: dict[tuple[int, ...], int] = {}
        ids: list[int] = []
        positions: list[int] = []
        for prompt in prompt_ids_B:
            if prompt not in starts:
                starts[prompt] = len(ids)
                ids += prompt
                positions += range(len(prompt))
        prompts = _Segments(list(starts.values()), [len(p) for p in starts], [0] * len(starts), [0] * len(starts))
        runs = _Segments([], [], [], [])
        places: list[int] = []
        ends: list[int] = []
        after_B = after_B or [False] * len(prompt_ids_B)
        sampled_B = sampled_B or [range(len(completion)) for completion in completions_B]
        for prompt, completion, after, sampled in zip(prompt_ids_B, completions_B, after_B, sampled_B, strict=True):
            begin, n = len(ids), len(completion)
            steps = [starts[prompt] + len(prompt) - 1, *range(begin, begin + n)]
            places += [steps[place] for place in sampled]
            if after:
                ends.append(steps[-1])
            fed = n if after else n - 1
            if fed > 0:
                for values, value in zip(
                    (runs.start, runs.length, runs.prefix_start, runs.prefix_length),
                    (begin, fed, starts[prompt], len(prompt)),
                    strict=True,
                ):
                    values.append(value)
                ids += completion[:fed]
                positions += range(len(prompt), len(prompt) + fed)
        self.ids = torch.tensor([ids], device=device)
        self.positions = torch.tensor([positions], device=device)
        self.place_M = torch.tensor(places + ends, device=device)
        self._calls = [_Call(part, device) for part in (*_alike(prompts), *_alike(runs))]
        self._query_index = torch.cat([c.query_index.flatten() for c in self._calls])
        self._key_index = torch.cat([c.key_index.flatten() for c in self._calls])
        read = torch.cat([c.read for c in self._calls]).nonzero().squeeze(1)
        self._answer_N = torch.empty(len(ids), dtype=torch.int64, device=device)
        self._answer_N[self._query_index[read]] = read

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """See `attention.Layout`; query (1, heads, N, d)."""
        # As an embedding: its backward adds whole rows in parallel, that of an index adds number by number.
        queries, keys, values = (
            F.embedding(index, x[0].transpose(0, 1).flatten(1))
            for index, x in ((self._query_index, query), (self._key_index, key), (self._key_index, value))
        )
        d, out, q_at, k_at = query.shape[-1], [], 0, 0
        for call in self._calls:
            (rows, q), k = call.query_index.shape, call.key_index.shape[1]
            parts = (queries[q_at : q_at + rows * q], keys[k_at : k_at + rows * k], values[k_at : k_at + rows * k])
            q_at, k_at = q_at + rows * q, k_at + rows * k
            split = [x.view(rows, -1, x.shape[1] // d, d).transpose(1, 2) for x in parts]
            out.append(call(split[0], split[1], split[2], scale).reshape(rows * q, -1))
        return F.embedding(self._answer_N, torch.cat(out)).view(1, len(self._answer_N), -1, d)


def _alike(segments: _Segments) -> list[_Segments]:
    """Segments of like length, those of one attention call together."""
    order = sorted(range(len(segments.start)), key=lambda i: -segments.length[i])
    calls: list[list[int]] = []
    cells = 0
    for i in order:
        n = segments.length[i]
        if not calls or (len(calls[-1]) >= SEGMENTS_PER_CALL and cells >= CELLS_PER_CALL):
            calls.append([])
            cells = 0
        calls[-1].append(i)
        cells += n * (n + segments.prefix_length[i])
    return [segments.pick(call) for call in calls]


def packed_hidden(model: Any, rollouts: TextRollouts, after_B: Tensor | None = None) -> Tensor:
    """The hidden state that predicts each completion token, (M, hidden), in row-major order of the mask; behind them
    those after the last tokens of the rows `after_B`."""
    ends = None if after_B is None else after_B.tolist()
    sampled = None
    if rollouts.inserted_B is not None:
        lengths = rollouts.length_B.tolist()
        sampled = [row[:n] for row, n in zip(rollouts.place_BT().tolist(), lengths, strict=True)]
    packed = Packed(rollouts.prompt_ids_B, rollouts.context_ids(), rollouts.mask_BT.device, ends, sampled)
    hidden = forward(model, packed.ids, packed.positions, packed)[0]
    return F.embedding(packed.place_M, hidden)


def bins(prompt_ids_B: Sequence[tuple[int, ...]], length_B: Sequence[int], budget: int) -> list[list[int]]:
    """Rows of each forward pass: whole groups where they fit, largest first, each pass within `budget` tokens.

    A group above the budget is cut, longest completions first, and its prompt computed once a piece; a row above it
    has a pass of its own.
    """
    members: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompt_ids_B):
        members.setdefault(prompt, []).append(row)
    pieces: list[tuple[int, list[int]]] = []
    for prompt, rows in members.items():
        size, piece = len(prompt), []  # type: int, list[int]
        for row in sorted(rows, key=lambda i: -length_B[i]):
            if piece and size + length_B[row] > budget:
                pieces.append((size, piece))
                size, piece = len(prompt), []
            piece.append(row)
            size += length_B[row]
        pieces.append((size, piece))
    filled: list[tuple[int, list[int]]] = []
    for size, rows in sorted(pieces, key=lambda piece: -piece[0]):
        at = next((i for i, (used, _) in enumerate(filled) if used + size <= budget), None)
        if at is None:
            filled.append((size, rows))
        else:
            filled[at] = (filled[at][0] + size, filled[at][1] + rows)
    return [rows for _, rows in filled]


@torch.no_grad()
def packs_exactly(model: Any) -> bool:
    """Whether the packed layout gives this model's own hidden states, tried on two prompts with three completions."""
    if not has_full_attention(model):
        return False
    core = core_of(model)
    weight = core.get_input_embeddings().weight
    number = iter(range(7, 10_000, 3))
    prompts = [tuple(next(number) % weight.shape[0] for _ in range(n)) for n in (5, 9)]
    prompt_ids_B = [prompts[0], prompts[1], prompts[1]]
    completions = [[next(number) % weight.shape[0] for _ in range(n)] for n in (4, 7, 2)]
    packed = Packed(prompt_ids_B, completions, weight.device)
    with eval_mode(model):
        try:
            ours = forward(model, packed.ids, packed.positions, packed)[0][packed.place_M]
        except (UnsupportedAttention, TypeError):  # TypeError: a forward that takes no further arguments
            return False
        theirs = []
        for prompt, completion in zip(prompt_ids_B, completions, strict=True):
            ids = torch.tensor([[*prompt, *completion]], device=weight.device)
            theirs.append(core.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1])
    expected = torch.cat(theirs)
    return bool((ours - expected).abs().max() <= tolerance(weight.dtype) * expected.abs().max())
