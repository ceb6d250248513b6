"""A training batch in one row without padding, in which completions of the same prompt share it.

The prompt is computed once, every completion attends to it, and its keys and values collect the gradient of all of
them: the same function of the weights as a row a completion, hence the same gradient. The last token of a completion
is no input, unless the state after it is asked for: nothing else reads what follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import to_device
from ..rollouts import TextRollouts, distinct
from .attention import Layout, forward
from .segments import MaskedCalls, PackedAttention, Segments


class Packed:
    """Rollouts laid out in one row, each prompt before its completions.

    Attributes:
        ids, positions: int64 (1, N).
        times_N: int64 (N,), how many rows have each place before a token that they predict: a prompt's as many as share
            it; 0 = filler.
        place_M: for each sampled token, in row-major order of the mask, the place whose output predicts it; then,
            for each row of `after_B` that is true, that of its last token.

    Args:
        completions_B: what follows each prompt. sampled_B: the places of the sampled tokens in it, of which the last
            token must be one; None = all.
        way: how it attends.
    """

    def __init__(
        self,
        prompt_ids_B: Sequence[tuple[int, ...]],
        completions_B: Sequence[Sequence[int]],
        device: torch.device,
        after_B: Sequence[bool] | None = None,
        sampled_B: Sequence[Sequence[int]] | None = None,
        way: type[PackedAttention] = MaskedCalls,
    ) -> None:
        ids: list[int] = []
        positions: list[int] = []
        times: list[int] = []
        segments = Segments([], [], [], [])

        def lay(run: Sequence[int], position: int, num_rows: int = 1, prefix_start: int = 0) -> int:
            begin = len(ids)
            if run:
                segments.add(begin, len(run), prefix_start, position)
                ids.extend(run)
                positions.extend(range(position, position + len(run)))
                times.extend([num_rows] * len(run))
            return begin

        after_B = after_B or [False] * len(prompt_ids_B)
        steps_B: list[list[int]] = [[] for _ in prompt_ids_B]
        for prompt, rows in _members(prompt_ids_B):
            start = lay(prompt, 0, len(rows))
            for row in rows:
                completion = completions_B[row]
                n = len(completion)
                begin = lay(completion[: n if after_B[row] else max(n - 1, 0)], len(prompt), prefix_start=start)
                steps_B[row] = [start + len(prompt) - 1, *range(begin, begin + n)]
        fill = way.filled(len(ids)) - len(ids)
        if fill:
            segments.add(len(ids), fill, 0, 0)
        sampled_B = sampled_B or [range(len(completion)) for completion in completions_B]
        places = [steps[place] for steps, sampled in zip(steps_B, sampled_B, strict=True) for place in sampled]
        ends = [steps[-1] for steps, after in zip(steps_B, after_B, strict=True) if after]
        self.ids = to_device([ids + ids[:1] * fill], device)
        self.positions = to_device([positions + [0] * fill], device)
        self.times_N = to_device(times + [0] * fill, device)
        self.place_M = to_device(places + ends, device)
        self.attention = way(segments, device)
        self.special = way.special

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """See `attention.Layout`; query (1, heads, N, d)."""
        return self.attention(query, key, value, scale)

    def attend_special(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, special: dict[str, Any]
    ) -> Tensor:
        """See `attention.SpecialLayout`."""
        return self.attention(query, key, value, scale, **special)


def _members(prompt_ids_B: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Each prompt with its rows."""
    prompts, places = distinct(prompt_ids_B)
    rows: list[list[int]] = [[] for _ in prompts]
    for row, place in enumerate(places):
        rows[place].append(row)
    return list(zip(prompts, rows, strict=True))


def packed_hidden(
    model: Any,
    rollouts: TextRollouts,
    after_B: Tensor | None = None,
    way: type[PackedAttention] = MaskedCalls,
    forward: Callable[[Any, Tensor, Tensor, Layout], Tensor] = forward,
) -> Tensor:
    """The hidden state that predicts each completion token, (M, hidden), in row-major order of the mask; behind them
    those after the last tokens of the rows `after_B`.

    forward: see `attention.forward`.
    """
    ends = None if after_B is None else after_B.tolist()
    sampled = None
    if rollouts.inserted_B is not None:
        sampled = [row[:n] for row, n in zip(rollouts.place_BT().tolist(), rollouts.lengths(), strict=True)]
    packed = Packed(rollouts.prompt_ids_B, rollouts.context_ids(), rollouts.mask_BT.device, ends, sampled, way)
    hidden = forward(model, packed.ids, packed.positions, packed)[0]
    return F.embedding(packed.place_M, hidden)


def bins(prompt_ids_B: Sequence[tuple[int, ...]], length_B: Sequence[int], budget: int) -> list[list[int]]:
    """Rows of each forward pass: whole groups where they fit, largest first, each pass within `budget` tokens.

    A group above the budget is cut, longest completions first, and its prompt computed once a piece; a row above it
    has a pass of its own.
    """
    pieces: list[tuple[int, list[int]]] = []
    for prompt, rows in _members(prompt_ids_B):
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
