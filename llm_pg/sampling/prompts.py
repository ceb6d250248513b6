"""Prompts that are computed once for all their completions: their keys and values, and the logits after them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..device import to_device
from ..model.attention import Layout, core_of, forward
from ..model.packing import Packed

Arrange = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Forward = Callable[[Any, Tensor, Tensor, Layout], Tensor]


class RecordedPrompts(Packed):
    """Packed prompts whose keys and values stay.

    Args:
        prompts: token ids. device: of the model.
        dtype: in which keys and values stay; None = as they are.
        options: of `Packed`.
    """

    def __init__(
        self,
        prompts: Sequence[tuple[int, ...]],
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(prompts, [()] * len(prompts), device, **options)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.dtype = dtype

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        self.kept[layer] = (key[0].to(self.dtype or key.dtype), value[0].to(self.dtype or value.dtype))
        return super().attend(layer, query, key, value, scale)


def compute_prompts(
    model: Any, prompts: Sequence[tuple[int, ...]], run: Forward = forward
) -> tuple[dict[int, tuple[Tensor, Tensor]], Tensor, Tensor]:
    """Of N prompts keys and values of each layer (N, heads, L, d), the lengths (N,), on the host, and the logits after
    them (N, V).

    Prompts of different lengths are padded here alone: by their first key and value, which have to be masked.
    """
    device = model.device
    distinct, which_N = _distinct(prompts)
    packed = RecordedPrompts(distinct, device)
    hidden = run(model, packed.ids, packed.positions, packed)[0]
    length_N = torch.tensor([len(p) for p in distinct])
    start_N = (length_N.cumsum(0) - length_N)[which_N]
    length_N = length_N[which_N]
    column = torch.arange(max(len(p) for p in prompts))
    source = to_device(start_N.unsqueeze(1) + torch.where(column < length_N.unsqueeze(1), column, 0), device)
    pairs = {
        layer: (key[:, source].transpose(0, 1), value[:, source].transpose(0, 1))
        for layer, (key, value) in packed.kept.items()
    }
    last_N = to_device(start_N + length_N - 1, device)
    return pairs, length_N, core_of(model).get_output_embeddings()(hidden[last_N])


class PromptTable:
    """Keys and values of prompts that rows read, each prompt in a place.

    A place whose prompt no row needs any more takes another. The host knows which prompt is where, and its length.

    Args:
        arrange: makes of keys and values (N, kv_heads, L, d) of prompts what is kept; None = they are kept so.
        run: computes them, see `attention.forward`.

    Attributes:
        pairs: what is kept of each layer, shorter prompts with something finite behind them.
        length_P: tokens of each. first_PV: the logits after them.
    """

    def __init__(
        self,
        model: Any,
        arrange: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        run: Forward = forward,
    ) -> None:
        self.model, self.device, self.arrange, self.run = model, model.device, arrange, run
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}
        self.place_of: dict[tuple[int, ...], int] = {}
        self.length_P = torch.zeros(0, dtype=torch.int64)
        self.first_PV = torch.zeros((0, 0), device=self.device)

    def enter(self, prompts_N: Sequence[tuple[int, ...]], others_R: Tensor) -> Tensor:
        """The places of `prompts_N`, computed where they are not there; others_R: places of the rows that stay."""
        in_use = set(others_R.tolist()) | {self.place_of[p] for p in prompts_N if p in self.place_of}
        self.place_of = {prompt: place for prompt, place in self.place_of.items() if place in in_use}
        new = [prompt for prompt in dict.fromkeys(prompts_N) if prompt not in self.place_of]
        if new:
            free = [place for place in range(len(self.length_P) + len(new)) if place not in in_use]
            self.compute(new, free[: len(new)])
        return torch.tensor([self.place_of[p] for p in prompts_N])

    def compute(self, prompts: Sequence[tuple[int, ...]], places: Sequence[int]) -> None:
        """Put the keys and values of `prompts`, and the logits after them, into `places`."""
        pairs, length_N, logits = compute_prompts(self.model, prompts, self.run)
        for layer, pair in pairs.items():
            new = pair if self.arrange is None else self.arrange(*pair)
            old = self.pairs.get(layer, (new[0][:0], new[1][:0]))
            self.pairs[layer] = (_put(old[0], new[0], places), _put(old[1], new[1], places))
        self.length_P = _put(self.length_P, length_N, places)
        self.first_PV = _put(self.first_PV.to(logits.dtype), logits, places)
        self.place_of.update(zip(prompts, places, strict=True))

    def keep(self, places: Tensor) -> None:
        """Go on with these places alone, sorted, which are numbered anew."""
        kept = to_device(places, self.device)
        self.pairs = {layer: (k[kept], v[kept]) for layer, (k, v) in self.pairs.items()}
        self.length_P, self.first_PV = self.length_P[places], self.first_PV[kept]
        renumbered = {old: new for new, old in enumerate(places.tolist())}
        self.place_of = {p: renumbered[old] for p, old in self.place_of.items() if old in renumbered}


def _distinct(prompts_R: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], Tensor]:
    """The prompts without repetition, and which of them each row has."""
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts_R))}
    return list(number), torch.tensor([number[p] for p in prompts_R])


def _put(table: Tensor, rows: Tensor, places: Sequence[int]) -> Tensor:
    """`table` with `rows` in `places`; made larger where it has to be, by zeros behind what it holds."""
    shape = [max(n, m) for n, m in zip(table.shape, rows.shape, strict=True)]
    shape[0] = max(len(table), max(places) + 1)
    if list(table.shape) != shape:
        larger = rows.new_zeros(shape)
        larger[tuple(slice(n) for n in table.shape)] = table
        table = larger
    inside: tuple[Tensor | slice, ...] = (to_device(places, rows.device), *(slice(n) for n in rows.shape[1:]))
    table[inside] = rows
    return table
