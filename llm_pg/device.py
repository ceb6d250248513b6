"""Numbers on their way from the host to its device, and the host's threads.

The host makes the choices of a run (which rows, which places, how long) and launches work ahead of the device. A plain
copy to CUDA waits until the device has done all of it, and so does every number that is read back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(values: Tensor | Sequence[Any], device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the values there, without waiting for the device.

    Args:
        values: of the host; a tensor that is there already is returned as it is.
        device: of torch.
        dtype: of the tensor; None = that of the values.
    """
    x = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    device = torch.device(device)
    # From pageable memory CUDA copies the numbers aside before it returns. Of Metal that is not known.
    return x.to(device, dtype, non_blocking=device.type != "mps")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread inside the block, for tensors so small that other threads cost more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
