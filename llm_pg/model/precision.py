"""The types in which weights are held and products computed, read off the model and not off the config alone.

A step of AdamW moves a weight by about the learning rate, and a weight of 0.02 in bfloat16 has its neighbours 1.2e-4
away: at a rate of 1e-6 nearly every step rounds back to where it came from. So every weight that is trained is held in
float32, and its products are computed in the 16-bit type it came in. A second float32 copy for the optimiser beside
16-bit weights would take as much memory (16 bytes a weight with AdamW) and have two versions of each weight.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from ..config import Config
from .adapters import has_adapter

HALF = (torch.bfloat16, torch.float16)


def half_type(model: Any) -> torch.dtype | None:
    """Returns the 16-bit type that most of the model's floating-point weights have; None where they are wider."""
    count: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            count[parameter.dtype] += parameter.numel()
    most = max(count, key=lambda dtype: count[dtype], default=None)
    return most if most in HALF else None


def compute_in(config: Config, half: torch.dtype | None, *, scales_losses: bool) -> None:
    """Sets `train.bf16` or `train.fp16` for a model that comes in a 16-bit type, unless the config says otherwise.

    Args:
        half: type that the model comes in; None = a wider one.
        scales_losses: whether float16 can be trained here (CUDA, and weights whole on every rank).
    """
    train = config.train
    if half is None or train.bf16 or train.fp16 or {"bf16", "fp16"} & train.model_fields_set:
        return
    train.bf16 = half is torch.bfloat16
    train.fp16 = half is torch.float16 and scales_losses


def products_of(config: Config) -> torch.dtype | None:
    """The type that matrix products are computed in, of sampling as of training; None = that of the weights."""
    return torch.bfloat16 if config.train.bf16 else torch.float16 if config.train.fp16 else None


@torch.no_grad()
def hold_trained_in_float32(model: Any, *, autocast: bool) -> str | None:
    """Holds every trained weight in float32, in place.

    Args:
        autocast: whether products are computed in a 16-bit type by autocast. Without it layers cannot mix types, so
            that frozen weights beside trained ones become float32 too (those under an adapter stay: peft casts).

    Returns:
        What was done, as a line of the log; None where nothing was to do.
    """
    trained = [p for p in model.parameters() if p.requires_grad and p.dtype in HALF]
    if not trained:
        return None
    came = trained[0].dtype
    for parameter in trained:
        parameter.data = parameter.data.float()
    if not autocast and not has_adapter(model):
        model.float()
    computed = f"computed in {_name(came)} by autocast" if autocast else "computed in float32"
    number, steps = sum(p.numel() for p in trained), _name(came)
    return (
        f"The model came in {steps}, in which small updates round to nothing: its {number:,} trained weights are held "
        f"in float32 (16 bytes each with gradient and AdamW's moments) and {computed}."
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
