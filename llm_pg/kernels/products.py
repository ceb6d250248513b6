"""Products of bfloat16 rows with weights that are packed for the kernel, in decoding and in an update.

A row's result is the same to the last bit in both, whatever rows are beside it: log-probabilities of sampler and
trainer then differ by nothing that rounding to bfloat16 would make large.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .build import library

# What a product makes: float32; rounded to bfloat16; that, added to what is there; that, as bfloat16.
FLOAT, ROUNDED, ADDED, HALF = range(4)
BLOCK = 64  # columns that lie together
_ADDRESS, _INDEX, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS = {
    "pack": (_ADDRESS, _INT, _ADDRESS, _INDEX, _INDEX, _INDEX),
    "product": (_ADDRESS, _INDEX, _ADDRESS, _ADDRESS, _ADDRESS, _INDEX, _INDEX, _INDEX, _INT),
}


def packs(dtype: torch.dtype | None, weights: Sequence[Tensor]) -> bool:
    """Whether the kernel multiplies by these weights in this type: bfloat16, where the processor computes in it."""
    if dtype is not torch.bfloat16:
        return False
    plain = all(type(w.data) is Tensor and w.device.type == "cpu" and w.dtype in _SOURCES for w in weights)
    return plain and _functions() is not None


class PackedWeight:
    """Weights of linear layers of one input as one, of which `packs` is true, as they are now.

    Args:
        weights: (n, k) each. biases: (n,) each; None = no bias.

    Attributes:
        num: sum of n. k: inputs.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = ()) -> None:
        self._functions = _functions()
        self._functions.set_threads(torch.get_num_threads())
        self.num, self.k = sum(len(w) for w in weights), weights[0].shape[1]
        self.packed = torch.zeros(-(-self.num // BLOCK) * BLOCK * self.width, dtype=torch.bfloat16)
        first = 0
        for weight in weights:
            weight = weight.detach().contiguous()
            half = weight.dtype is torch.bfloat16
            self._functions.pack(weight.data_ptr(), half, self.packed.data_ptr(), first, len(weight), self.k)
            first += len(weight)
        bias = joined_biases(weights, biases)
        self.bias = None if bias is None else bias.to(torch.bfloat16).float()

    @property
    def width(self) -> int:
        """Numbers of a row that it takes: k, made even by a zero."""
        return self.k + self.k % 2

    def __call__(self, x: Tensor, result: int, out: Tensor | None = None) -> Tensor:
        """Rows x (N, width) in bfloat16 times the weight: (N, num), in bfloat16 for HALF, else float32, into `out`."""
        if out is None:
            out = torch.empty((len(x), self.num), dtype=torch.bfloat16 if result == HALF else torch.float32)
        bias = None if self.bias is None else self.bias.data_ptr()
        self._functions.set_threads(torch.get_num_threads())
        self._functions.product(
            x.data_ptr(), x.shape[1], self.packed.data_ptr(), bias, out.data_ptr(), len(x), self.num, self.k, result
        )
        return out


_SOURCES = (torch.float32, torch.bfloat16)


def joined_biases(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    """Biases of linear layers that are computed as one, zeros where one has none; None where no layer has any.

    Args:
        weights: (n, k) each. biases: (n,) each or None; or none at all.
    """
    if all(bias is None for bias in biases):
        return None
    parts = [w.new_zeros(len(w)) if b is None else b.detach() for w, b in zip(weights, biases, strict=True)]
    return torch.cat(parts)


@functools.cache
def _functions() -> Any:
    """The library; None where there is none, or the processor has no products in bfloat16."""
    found: Any = library()
    if found is None or not found.has_bf16():
        return None
    for name, kinds in _ARGUMENTS.items():
        function = getattr(found, name)
        function.argtypes, function.restype = kinds, None
    return found
