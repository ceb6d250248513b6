"""The kernels as functions of tensors. Their library is `build.library()`."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from .build import library

LANES = 16  # tokens whose keys lie together

Pair = tuple[Tensor, Tensor]
_ADDRESS, _INDEX, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "set_threads": (_INT,),
    "norm": (_ADDRESS, _ADDRESS, _FLOAT, _ADDRESS, _INT, _INDEX, _INDEX, _INDEX),
    "gated": (_ADDRESS, _INT, _ADDRESS, _INT, _INDEX, _INDEX, _INDEX),
    "attend": (*[_ADDRESS] * 5, _FLOAT, _FLOAT, _INT, *[_ADDRESS] * 7, _INT, _INDEX),
    "draw": (_ADDRESS, _FLOAT, _ADDRESS, _ADDRESS, _ADDRESS, _INDEX, _INDEX),
}


class Heads(ctypes.Structure):
    """Sizes of an attention: of `decoding.cpp`."""

    _fields_ = tuple((name, _INDEX) for name in ("rows", "heads", "kv_heads", "d", "width", "capacity"))


class Kernels:
    """The library's functions. Tensors are contiguous and on the CPU; float32 where nothing else is said.

    The next product takes its rows as float32 (N, k) or as bfloat16 (N, k + k % 2): functions that end in such rows
    write them into `to`, which is of that kind.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: Any = library
        for name, kinds in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = kinds, None
        self.follow_threads()

    def follow_threads(self) -> None:
        """As many threads as torch has now."""
        self._functions.set_threads(torch.get_num_threads())

    def norm(self, x: Tensor, weight: Tensor, eps: float, to: Tensor) -> Tensor:
        """RMSNorm of the rows of x (N, n)."""
        self._functions.norm(
            x.data_ptr(), weight.data_ptr(), eps, to.data_ptr(), to.dtype == torch.bfloat16, to.shape[1], *x.shape
        )
        return to

    def gated(self, both: Tensor, to: Tensor, *, rounded: bool) -> Tensor:
        """silu(gate) · up of `both` (N, gate and up); rounded: the first factor to bfloat16, as under autocast."""
        rows, twice = both.shape
        self._functions.gated(
            both.data_ptr(), rounded, to.data_ptr(), to.dtype == torch.bfloat16, to.shape[1], rows, twice // 2
        )
        return to

    def attend(
        self, qkv: Tensor, rotation: Pair, norms: tuple[Tensor | None, Tensor | None, float], scale: float,
        prompt: Pair, own: Pair, where: Tensor, heads: Heads, to: Tensor, *, rounded: bool,
    ) -> Tensor:  # fmt: skip
        """Attention of one new token a row, whose key and value are written into `own`; see `decoding.cpp`."""
        half = to.dtype == torch.bfloat16
        self._functions.attend(
            qkv.data_ptr(), rotation[0].data_ptr(), rotation[1].data_ptr(), _address(norms[0]), _address(norms[1]),
            norms[2], scale, rounded, prompt[0].data_ptr(), prompt[1].data_ptr(), own[0].data_ptr(), own[1].data_ptr(),
            where.data_ptr(), ctypes.addressof(heads), to.data_ptr(), half, to.shape[1],
        )  # fmt: skip
        return to

    def draw(self, logits: Tensor, temperature: float, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens drawn from softmax(logits / temperature), (N, V), and their log-probabilities.

        uniforms: float64 in [0, 1), through the inverse of the distribution function; None = the most probable tokens.
        """
        token_N = torch.empty(len(logits), dtype=torch.int64)
        logp_N = torch.empty(len(logits), dtype=torch.float32)
        self._functions.draw(
            logits.data_ptr(), temperature, _address(uniforms), token_N.data_ptr(), logp_N.data_ptr(), *logits.shape
        )
        return token_N, logp_N


@functools.cache
def decoding_kernels() -> Kernels | None:
    """The kernels; None = there are none here."""
    found = library()
    return None if found is None else Kernels(found)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
