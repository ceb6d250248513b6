"""Linear layers under autocast, for a step that is recorded: cast copies at addresses that stay.

Autocast keeps its copies until its block ends and makes them anew elsewhere, and without keeping any it would cast
every weight for every token. These are made once and written again before each batch. Layers of one input are one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model.precision import HALF
from ...model.wide import wide_product
from ..lean import LeanDecoder


class Refreshed:
    """Plain linear layers of the same input as one, in another type: (R, in) -> (R, sum of outs).

    wide: the result in float32, as that of the output layer.
    """

    def __init__(self, layers: tuple[nn.Linear, ...], dtype: torch.dtype, *, wide: bool = False) -> None:
        self.layers, self.wide = layers, wide and dtype in HALF and not any(layer.bias is not None for layer in layers)
        first = layers[0].weight
        outs = [layer.weight.shape[0] for layer in layers]
        self.weight = torch.empty((sum(outs), first.shape[1]), dtype=dtype, device=first.device)
        has_bias = any(layer.bias is not None for layer in layers)
        self.bias = torch.zeros(sum(outs), dtype=dtype, device=first.device) if has_bias else None
        self.outs = outs
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the weights as they are now."""
        for layer, part in zip(self.layers, self.weight.split(self.outs), strict=True):
            part.copy_(layer.weight)
        if self.bias is not None:
            for layer, part in zip(self.layers, self.bias.split(self.outs), strict=True):
                if layer.bias is not None:
                    part.copy_(layer.bias)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        return wide_product(x, self.weight) if self.wide else F.linear(x, self.weight, self.bias)


def use_refreshed(lean: LeanDecoder, dtype: torch.dtype) -> list[Refreshed]:
    """Put `Refreshed` in the place of the plain linear layers of `lean`, and return them."""
    made = []
    homes: list[tuple[Any, str]] = [(lean, "head")]
    homes += [(layer, name) for layer in lean.layers for name in ("qkv", "out", "gate_up", "down")]
    for home, name in homes:
        layers = getattr(home, name).layers
        if all(type(layer) is nn.Linear and type(layer.weight.data) is Tensor for layer in layers):
            made.append(Refreshed(layers, dtype, wide=name == "head"))
            setattr(home, name, made[-1])
    return made
