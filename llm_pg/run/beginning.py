"""Whether all ranks begin with the same weights and prompts: gradients are summed as if they did."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..prompts import Prompt, fingerprint
from .ranks import Ranks

_SAMPLED = 64  # values of each tensor whose order counts too
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_same_start(model: Any, prompts: Sequence[Prompt], ranks: Ranks) -> None:
    """ConfigError, on every rank, where one begins with other weights or prompts than the first. All must call it."""
    if ranks.count == 1:
        return
    _compare(weight_digests(model), ranks, "weights", "tensors", "set one seed before the model is made, or load it")
    _compare({"": fingerprint(prompts)}, ranks, "training prompts", "sets", "give all ranks one dataset, in one order")


def _compare(own: dict[str, str], ranks: Ranks, what: str, of: str, advice: str) -> None:
    summary = hashlib.sha256(repr(sorted(own.items())).encode()).hexdigest()
    told = ranks.gather(summary)
    if len(set(told)) == 1:
        return
    first, *others = ranks.gather(own)
    lines = []
    for rank, theirs in enumerate(others, 1):
        odd = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
        if odd:
            lines.append(f"rank {rank} ({len(odd)} of {len(first)} {of} differ{f', {odd[0]} first' if odd[0] else ''})")
    raise ConfigError(
        f"The ranks do not begin with the same {what}: other than those of rank 0 are those of {', '.join(lines)}. "
        f"Each would train on its own, on a sum of gradients of all. On every rank: {advice}."
    )


@torch.no_grad()
def weight_digests(model: Any) -> dict[str, str]:
    """A digest of every parameter and buffer by name: type, shape, the sum of its bits as integers, some of its values.

    Sums of integers are exact, so that they do not depend on threads or devices, and any single change shows in them.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: _digest(x) for name, x in tensors.items() if not x.is_meta}


def _digest(x: Tensor) -> str:
    bits = x.detach().view(_INTEGERS[x.element_size()])
    total = int(bits.sum(dtype=torch.int64))
    flat = bits.reshape(-1)
    some = flat[:: max(len(flat) // _SAMPLED, 1)].tolist()
    return hashlib.sha256(repr((str(x.dtype), tuple(x.shape), total, some)).encode()).hexdigest()
