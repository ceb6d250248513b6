"""How a model is decoded: the first way that a trial finds exact, chosen before the first step.

The trial takes rows of two prompts through all that a batch goes through: steps, a row that leaves, one that enters.
Each time the logits are compared with those of the row alone in the model's own forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.decoding import Kernels
from ..model.attention import FAULTS, core_of, eval_mode, tolerance
from ..model.cache import CachedForward, UnknownCache
from ..model.exact import packs_exactly
from ..model.head import head_is_separate
from .cached import CacheDecoder, WholeRowDecoder
from .compiled import CompiledDecoder, in_float32_on_cpu
from .decoding import Decoder, SharedDecoder
from .lean import LeanDecoder, NotLlamaStyle

PROMPTS = (tuple(range(7, 40, 3)), tuple(range(11, 31, 4)), tuple(range(3, 45, 3)))


Make = Callable[[Any, bool], Decoder]


@dataclass(frozen=True)
class Choice:
    """A way to decode.

    Attributes:
        name: lean, shared (prompts' keys once for all their rows), cache (the model's own) or whole rows.
        make: of a decoder for one batch, of this model or one of the same architecture; its second argument: whether
            rows will enter it.
        refills: whether rows may enter.
        why: of whole rows: what speaks against the model's cache.
        compiled: whether the kernels step.
    """

    name: str
    make: Make
    refills: bool = True
    why: str = ""
    compiled: bool = False


@torch.no_grad()
def choose(
    model: Any, pad_id: int, *, share_prompts: bool = True, lean: bool = True, kernels: Kernels | None = None
) -> Choice:
    """The way for this model, tried with its present weights; without `share_prompts` from its cache on, without `lean`
    its own layers only, with `kernels` the lean layers by them where they can."""
    with eval_mode(model):
        if share_prompts and head_is_separate(model) and packs_exactly(model):
            expected = _expected(model)
            if lean and kernels is not None:

                def compiled(model: Any, refills: bool) -> Decoder:
                    if in_float32_on_cpu(model):
                        return CompiledDecoder(model, kernels)
                    return SharedDecoder(model, LeanDecoder(model), refills=refills)  # it was moved since the trial

                if in_float32_on_cpu(model) and objection_to(model, compiled, expected) is None:
                    return Choice("lean", compiled, compiled=True)
            for name in ("lean", "shared")[not lean :]:

                def shared(model: Any, refills: bool, name: str = name) -> Decoder:
                    return SharedDecoder(model, LeanDecoder(model) if name == "lean" else None, refills=refills)

                if objection_to(model, shared, expected) is None:
                    return Choice(name, shared)
        return _through_cache(model, pad_id)


def _through_cache(model: Any, pad_id: int) -> Choice:
    try:
        forward, expected = CachedForward(model), _expected(model)
    except FAULTS as error:
        objection: str | None = _reason(error)
    else:
        for refills, masks, pads in itertools.product((True, False), repeat=3):

            def cached(model: Any, _refills: bool, masks: bool = masks, pads: bool = pads) -> Decoder:
                return CacheDecoder(model, forward, pad_id, pads_prompts=pads, masks_steps=masks)

            objection = objection_to(model, cached, expected, refills=refills)
            if objection is None:
                return Choice("cache", cached, refills)
    return Choice("whole rows", lambda model, _: WholeRowDecoder(model, pad_id), why=objection or "")


def _reason(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return first if isinstance(error, UnknownCache) else f"{type(error).__name__}: {first}"


def _rows(model: Any) -> list[list[int]]:
    """Three rows of the trial, whole: two of the first prompt, one of the second; and the one that enters."""
    ends = ((13, 5, 61), (29, 17, 41), (47, 61, 3), (23, 2, 19))
    prompts = (PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[2])
    vocabulary = core_of(model).get_input_embeddings().weight.shape[0]
    return [[i % vocabulary for i in (*prompt, *end)] for prompt, end in zip(prompts, ends, strict=True)]


def _expected(model: Any) -> list[Tensor]:
    """Of each row of the trial the logits at all its places, (N, V), by the model's own forward."""
    device = model.device
    return [model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0] for ids in _rows(model)]


def objection_to(model: Any, make: Make, expected: list[Tensor], *, refills: bool = True) -> str | None:
    """Why a model cannot be decoded in this way; None = the trial found no reason."""
    # While sampling the softmax is in float32 whatever the weights are.
    bound = max(tolerance(expected[0].dtype), tolerance(torch.float32)) * float(torch.cat(expected).abs().max())
    try:
        worst = max(_gaps(model, make(model, refills), expected, refills))
    except torch.OutOfMemoryError:
        raise
    except (NotLlamaStyle, *FAULTS) as error:
        return _reason(error)
    return None if worst <= bound else f"a trial gave logits that differ by {worst:.2g}"


def _gaps(model: Any, decoder: Decoder, expected: list[Tensor], refills: bool) -> list[float]:
    """The largest difference of logits after each part of the trial; NaN counts as infinite."""
    rows, device = _rows(model), model.device
    prompts = [tuple(row[:-3]) for row in rows]
    taken = [0, 0, 0, 0]  # tokens that each row has behind its prompt
    gaps: list[float] = []

    def compare(logits: Tensor, batch: list[int]) -> None:
        wanted = torch.stack([expected[r][len(prompts[r]) - 1 + taken[r]] for r in batch])
        gaps.append(float((logits.float() - wanted.float()).abs().nan_to_num(nan=torch.inf).max()))

    def step(batch: list[int]) -> None:
        tokens = torch.tensor([rows[r][len(prompts[r]) + taken[r]] for r in batch], device=device)
        logits = decoder.step(tokens, torch.tensor([taken[r] for r in batch]))
        for r in batch:
            taken[r] += 1
        compare(logits, batch)

    compare(decoder.prefill(prompts[:3]), [0, 1, 2])
    step([0, 1, 2])
    decoder.keep(torch.tensor([0, 2]))
    step([0, 2])
    if refills:
        compare(decoder.refill(torch.tensor([1]), prompts[3:]), [3])
        step([0, 3])
    return gaps
