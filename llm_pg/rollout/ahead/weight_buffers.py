"""Copies of a model's weights in memory that two processes share: the trainer writes, the sampler reads."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping

import torch
from torch import Tensor

_ALIGNED = 64  # bytes; tensors of any type may begin there
# name, type and shape of each tensor, as JSON carries it.
Layout = list[tuple[str, str, list[int]]]


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    return [(name, str(x.dtype).removeprefix("torch."), list(x.shape)) for name, x in tensors.items()]


class WeightBuffers:
    """`count` places for tensors of one layout. What is written here is seen by whoever holds the same descriptor.

    Nothing guards a slot: the trainer reuses one only after everything sampled with it was trained on (see `loop`).

    Args:
        handle: of `anonymous_file`.
    """

    def __init__(self, handle: int, layout: Layout, count: int) -> None:
        starts, end = [], 0
        for _, dtype, shape in layout:
            starts.append(end)
            end += math.ceil(_bytes(dtype, shape) / _ALIGNED) * _ALIGNED
        if os.fstat(handle).st_size < end * count:
            os.ftruncate(handle, end * count)
        flat = torch.frombuffer(mmap.mmap(handle, end * count), dtype=torch.uint8)
        self.count = count
        self.views: list[dict[str, Tensor]] = [
            {
                name: flat[at : at + _bytes(dtype, shape)].view(getattr(torch, dtype)).view(shape)
                for (name, dtype, shape), at in zip(layout, (slot * end + start for start in starts), strict=True)
            }
            for slot in range(count)
        ]

    def put(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        for name, view in self.views[slot].items():
            view.copy_(tensors[name])


def _bytes(dtype: str, shape: list[int]) -> int:
    return math.prod(shape) * int(getattr(torch, dtype).itemsize)
