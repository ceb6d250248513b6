"""Random numbers as functions, not state: a uniform is a hash of (stream key, position).

So a run needs no generator state to resume, and a completion does not depend on the batch it was sampled in.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB

ONE_SUM = 4096  # tokens of a vocabulary that are summed one by one
SPAN = 256  # tokens of a block of a larger one


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 (Steele, Lea and Flood 2014); arithmetic wraps, shifts are made logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def stream_key(*parts: int | Tensor) -> Tensor:
    """An int64 key of any integers (or int64 tensors that broadcast): seed, step, prompt, sample."""
    key = torch.zeros((), dtype=torch.int64)
    for part in parts:
        value = part if isinstance(part, Tensor) else torch.tensor(part, dtype=torch.int64)
        key = _mix(key.to(value.device) * _MIX_1 + value.long() + _GOLDEN)
    return key


def uniform(key: Tensor, position: int | Tensor) -> Tensor:
    """A float64 in [0, 1) for each key at a position of its stream, 53 random bits."""
    bits = _mix(key + (position + 1) * torch.full((), _GOLDEN, dtype=torch.int64, device=key.device))
    return ((bits >> 11) & 0x1FFFFFFFFFFFFF).double() * 2.0**-53


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Sample from softmax(`logits`) by the inverse of its distribution function: (B, V) and (B,) in [0, 1) -> (B,).

    Over a large vocabulary the function is summed in blocks, and token by token within one block alone.
    """
    mass = logits.softmax(-1)
    num_tokens = mass.shape[-1]
    if num_tokens <= ONE_SUM:
        cdf = mass.double().cumsum(-1)
        target = (uniforms * cdf[:, -1]).unsqueeze(-1)
        return torch.searchsorted(cdf, target, right=True).squeeze(-1).clamp(max=num_tokens - 1)
    blocks = torch.nn.functional.pad(mass, (0, -num_tokens % SPAN)).unflatten(-1, (-1, SPAN))
    until = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    # Rounding must not lead behind the last token with any mass, in all or in the block.
    target = torch.minimum(uniforms * until[:, -1], until[:, -1].nextafter(torch.zeros_like(uniforms))).unsqueeze(-1)
    block = torch.searchsorted(until, target, right=True).clamp(max=until.shape[-1] - 1)
    before = torch.nn.functional.pad(until, (1, 0)).gather(-1, block)
    cdf = blocks.take_along_dim(block.unsqueeze(-1), 1).squeeze(1).double().cumsum(-1)
    target = torch.minimum(target - before, cdf[:, -1:].nextafter(torch.zeros_like(before)))
    inside = torch.searchsorted(cdf, target, right=True)
    return (block * SPAN + inside).squeeze(-1).clamp(max=num_tokens - 1)
