"""A training batch in which each prompt is computed once and its completions go on from the model's own cache.

For layers that packed rows do not compute: states of convolutions and recurrences, windows, positions in the scores. A
cache begins anew with each prompt, so no state crosses from a row to another, and it carries the gradient of all
completions back to their prompt. Prompts of one length are computed together, and so are their completions, padded on
the right, which no causal model sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import to_device
from ..rollouts import TextRollouts, distinct
from .attention import body_of
from .cache import CachedForward, without_copies

LEAST_WIDTH = 2  # columns of completions in a pass: of one column models make a step, which changes states in place
# Tokens of a padded pass to those of a grouped one from which the latter is taken: it has more and smaller products.
WORTH = 1.3


class Grouped:
    """Passes of one model.

    Attributes:
        listener: called after a pass with the outputs of its parts, and with how often each of their tokens counts: a
            prompt's as often as rows have it, padding 0 times.

    Raises:
        UnknownCache: see `CachedForward`.
    """

    def __init__(self, model: Any) -> None:
        with torch.no_grad():
            self.forward = CachedForward(model, of_body=True)
        self.listener: Callable[[list[Any], list[Tensor]], None] | None = None

    def hidden(self, model: Any, rollouts: TextRollouts, after_B: Tensor | None = None) -> Tensor:
        """The hidden state that predicts each completion token, (M, hidden), in row-major order of the mask; behind
        them those after the last tokens of the rows `after_B`.

        model: that of the passes, or one of the same architecture.
        """
        lengths = rollouts.lengths()
        sampled_B: Sequence[Sequence[int]] = [range(n) for n in lengths]
        if rollouts.inserted_B is not None:
            sampled_B = [row[:n] for row, n in zip(rollouts.place_BT().tolist(), lengths, strict=True)]
        after = [False] * len(lengths) if after_B is None else after_B.tolist()
        return self.states(model, rollouts.prompt_ids_B, rollouts.context_ids(), sampled_B, after)

    def states(
        self,
        model: Any,
        prompt_ids_B: Sequence[tuple[int, ...]],
        completions_B: Sequence[Sequence[int]],
        sampled_B: Sequence[Sequence[int]],
        after_B: Sequence[bool],
    ) -> Tensor:
        """See `hidden`; sampled_B: the places of the sampled tokens in what follows each prompt."""
        parts: list[Tensor] = []
        outs: list[Any] = []
        times: list[Tensor] = []
        steps_B: list[list[int]] = [[] for _ in prompt_ids_B]  # where the state before and after each token is
        begin = 0
        for length in sorted({len(prompt) for prompt in prompt_ids_B}):
            rows = [row for row, prompt in enumerate(prompt_ids_B) if len(prompt) == length]
            prompts, of_R = distinct([prompt_ids_B[row] for row in rows])
            read_R = [completions_B[row][: len(completions_B[row]) - (not after_B[row])] for row in rows]
            made = self._pass(body_of(model), prompts, of_R, read_R)
            parts += [made[0].last_hidden_state[:, -1], *(out.last_hidden_state.flatten(0, 1) for out in made[1:])]
            width = made[1].last_hidden_state.shape[1] if len(made) > 1 else 0
            outs += made
            times += _times(of_R, length, [len(read) for read in read_R], width, parts[0].device)
            for i, row in enumerate(rows):
                at = begin + len(prompts) + i * width
                steps_B[row] = [begin + of_R[i], *range(at, at + len(read_R[i]))]
            begin += len(prompts) + len(rows) * width
        places = [steps[t] for steps, sampled in zip(steps_B, sampled_B, strict=True) for t in sampled]
        ends = [steps[-1] for steps, after in zip(steps_B, after_B, strict=True) if after]
        if self.listener is not None:
            self.listener(outs, times)
        return F.embedding(to_device(places + ends, parts[0].device), torch.cat(parts))

    def _pass(
        self, body: Any, prompts: Sequence[tuple[int, ...]], of_R: Sequence[int], read_R: Sequence[Sequence[int]]
    ) -> list[Any]:
        """The outputs of the body for the prompts, (P, L), and for what is read behind them, (R, W), if anything is."""
        device = next(body.parameters()).device
        ids = to_device(prompts, device)
        first, cache = self.forward(ids, _positions(ids, 0), None, None, body)
        width = max(len(read) for read in read_R)
        if width == 0:
            return [first]
        width = max(width, LEAST_WIDTH)
        self.forward.rows.select(cache, to_device(of_R, device))
        without_copies(cache)
        more = to_device([[*read, *[0] * (width - len(read))] for read in read_R], device)
        second, _ = self.forward(more, _positions(more, ids.shape[1]), None, cache, body)
        return [first, second]


def _times(of_R: Sequence[int], length: int, read_R: Sequence[int], width: int, device: torch.device) -> list[Tensor]:
    """How often each token of the two parts of a pass counts, one tensor a part."""
    prompts = torch.bincount(torch.tensor(of_R)).repeat_interleave(length)
    inside = torch.arange(width) < torch.tensor(read_R).unsqueeze(1)
    return [to_device(x, device) for x in (prompts, inside.long().flatten())][: 1 + (width > 0)]


def _positions(ids: Tensor, first: int) -> Tensor:
    return torch.arange(first, first + ids.shape[1], device=ids.device).expand_as(ids)


def is_worth_it(rollouts: TextRollouts) -> bool:
    """Whether these rows, padded, have so many more tokens that each prompt should be computed once."""
    prompts, lengths = rollouts.prompt_ids_B, rollouts.context_length_B.tolist()
    padded = len(lengths) * max(len(p) + n for p, n in zip(prompts, lengths, strict=True))
    grouped = sum(len(prompt) for prompt in distinct(prompts)[0])
    for length in {len(prompt) for prompt in prompts}:
        members = [n for p, n in zip(prompts, lengths, strict=True) if len(p) == length]
        grouped += len(members) * max(members)
    return padded >= WORTH * grouped
