"""Rotary frequencies that hang on the longest row of a batch (longrope, dynamic NTK), fixed for a run.

Past the original context such a model has other frequencies, for every token of every row that is computed beside a
long one: a row's log-probability then depends on its neighbours, and what is sampled one token at a time, with keys
that were rotated before the row grew long, is not what training computes. With the frequencies of the longest row that
the run can have, for every row, the policy is one function of the tokens again. vLLM chooses the same, by the longest
row it may be given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import core_of

PROBE = 4  # positions whose embedding is compared beside a short and a long row


def fix_frequencies(model: Any, longest: int) -> list[str]:
    """Fixes what depends on the longest row of a batch to rows of `longest` tokens, in place.

    Returns:
        The kinds of rotary embedding that were fixed ("longrope", ...); none where rows of at most `longest` tokens
        have the same frequencies whatever is beside them.
    """
    kinds = []
    for module in core_of(model).modules():
        kind = getattr(module, "rope_type", None)
        if kind is not None and _depends(module, longest):
            _Beside(module, longest)
            kinds += [kind] if isinstance(kind, str) else sorted(set(kind.values()) - {"default"})
    return sorted(set(kinds))


@torch.no_grad()
def _depends(module: Any, longest: int) -> bool:
    """Whether the first positions have another embedding where the last one is beside them."""
    if longest <= PROBE:
        return False
    device = next((buffer.device for buffer in module.buffers()), torch.device("cpu"))
    x = torch.zeros((1, PROBE, 1), device=device)
    few = torch.arange(PROBE, device=device).unsqueeze(0)
    kinds = module.rope_type
    layers: list[dict[str, Any]] = [{}] if isinstance(kinds, str) else [{"layer_type": layer} for layer in kinds]
    for layer in layers:
        try:
            alone = _tensors(module(x, few, **layer))
            beside = _tensors(module(x, torch.cat([few, torch.full_like(few[:, :1], longest - 1)], 1), **layer))
        except (TypeError, ValueError, IndexError, KeyError):
            return False  # positions of several axes, or a way of its own
        if any(not torch.equal(a, b[..., :PROBE, :]) for a, b in zip(alone, beside, strict=True)):
            return True
    return False


def _tensors(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


class _Beside:
    """Puts a position beside those of every call, so that all calls have the frequencies of the longest row."""

    def __init__(self, module: Any, longest: int) -> None:
        self.last = longest - 1
        module.register_forward_pre_hook(self.add, with_kwargs=True)
        module.register_forward_hook(self.take)

    def add(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        longer = torch.cat([positions, torch.full_like(positions[..., :1], self.last)], -1)
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": longer}
        return (args[0], longer, *args[2:]), kwargs

    def take(self, module: Any, args: tuple[Any, ...], out: Any) -> Any:
        if isinstance(out, Tensor):
            return out[..., :-1, :]
        return tuple(part[..., :-1, :] for part in out)
