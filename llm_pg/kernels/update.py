"""The kernels of an update as functions of tensors: parts of a layer, attention, the softmax of the output layer."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .build import library

_ADDRESS, _INDEX, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "set_threads": (_INT,),
    "add_norm": (_ADDRESS, _ADDRESS, _INT, _ADDRESS, _FLOAT, _ADDRESS, _ADDRESS, _ADDRESS, _INT, _INDEX, _INDEX),
    "add_norm_slopes": (*[_ADDRESS] * 4, _INT, *[_ADDRESS] * 4, _INDEX, _INDEX),
    "gate": (_ADDRESS, _INT, _ADDRESS, _INDEX, _INDEX),
    "gate_slopes": (_ADDRESS, _ADDRESS, _INT, _ADDRESS, _INDEX, _INDEX),
    "rotate_heads": (_ADDRESS, _INT, _ADDRESS, _ADDRESS, _INT, _ADDRESS, *[_INDEX] * 4),
    "softmax": (_ADDRESS, _FLOAT, _ADDRESS, _ADDRESS, _ADDRESS, _INDEX, _INDEX),
    "softmax_slopes": (_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _INT, _INDEX, _INDEX),
    "attend_packed": (_ADDRESS, _INT, *[_ADDRESS] * 5, _FLOAT, _ADDRESS),
    "attend_packed_slopes": (_ADDRESS, _INT, *[_ADDRESS] * 5, _FLOAT, _ADDRESS),
}
TYPES = (torch.float32, torch.bfloat16)
LANES = 16  # of `common.h`


class Runs:
    """Which runs of tokens read which, for `UpdateKernels.attend`.

    Args:
        groups: of each its runs, (start, length); the first is read by the others too.
    """

    def __init__(self, groups: Sequence[Sequence[tuple[int, int]]]) -> None:
        begins, runs = [0], [run for group in groups for run in group]
        for group in groups:
            begins.append(begins[-1] + len(group))
        follows = [int(place > 0) for group in groups for place in range(len(group))]
        self.columns = [torch.tensor(x) for x in (begins, [s for s, _ in runs], [n for _, n in runs], follows)]
        self.num_groups = len(groups)
        self.most = max(sum(-(-n // LANES) * LANES for _, n in group) for group in groups)


class UpdateKernels:
    """The library's functions. Tensors are contiguous and on the CPU, float32 or, where it is said, bfloat16."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: Any = library
        for name, kinds in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = kinds, None

    def follow_threads(self) -> UpdateKernels:
        """As many threads as torch has now."""
        self._functions.set_threads(torch.get_num_threads())
        return self

    def add_norm(
        self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x + delta (x where there is none), 1 / its root mean square, and its norm in `dtype`; delta: either type."""
        total = x if delta is None else torch.empty_like(x)
        rate, normed = x.new_empty((len(x), 1)), torch.empty_like(x, dtype=dtype)
        self._functions.add_norm(
            x.data_ptr(), _address(delta), delta is not None and _is_half(delta), weight.data_ptr(), eps,
            total.data_ptr(), rate.data_ptr(), normed.data_ptr(), _is_half(normed), *x.shape,
        )  # fmt: skip
        return total, rate, normed

    def add_norm_slopes(
        self, total: Tensor, rate: Tensor, weight: Tensor, d_normed: Tensor, d_total: Tensor,
        delta_type: torch.dtype | None, *, of_weight: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """Gradients by x, by delta in its type, and by the weight; d_normed of either type."""
        d_x = torch.empty_like(total)
        d_delta = torch.empty_like(total, dtype=delta_type) if delta_type is torch.bfloat16 else None
        d_weight = torch.empty_like(weight) if of_weight else None
        self._functions.add_norm_slopes(
            total.data_ptr(), rate.data_ptr(), weight.data_ptr(), d_normed.data_ptr(), _is_half(d_normed),
            d_total.data_ptr(), d_x.data_ptr(), _address(d_delta), _address(d_weight), *total.shape,
        )  # fmt: skip
        return d_x, d_x if delta_type is torch.float32 else d_delta, d_weight

    def gate(self, both: Tensor) -> Tensor:
        """silu(gate)·up of (N, gate and up), of either type."""
        rows, width = both.shape
        out = both.new_empty((rows, width // 2))
        self._functions.gate(both.data_ptr(), _is_half(both), out.data_ptr(), rows, width // 2)
        return out

    def gate_slopes(self, both: Tensor, slope: Tensor) -> Tensor:
        """The gradient by `both`."""
        out, (rows, n) = torch.empty_like(both), slope.shape
        self._functions.gate_slopes(both.data_ptr(), slope.data_ptr(), _is_half(both), out.data_ptr(), rows, n)
        return out

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, heads: int, *, back: bool = False) -> Tensor:
        """The first `heads` of (N, all, d) rotated, of either type; back: its gradient; cos, sin: see `Rotated`."""
        out, (rows, every, d) = torch.empty_like(x), x.shape
        self._functions.rotate_heads(
            x.data_ptr(), _is_half(x), cos.data_ptr(), sin.data_ptr(), back, out.data_ptr(), rows, heads, every, d
        )
        return out

    def softmax(
        self, logits: Tensor, temperature: float, token: Tensor, logp: Tensor, entropy: Tensor | None
    ) -> Tensor:
        """Logits (N, V) / temperature become probabilities in place; logp and entropy of each row are written."""
        self._functions.softmax(
            logits.data_ptr(), temperature, token.data_ptr(), logp.data_ptr(), _address(entropy), *logits.shape
        )
        return logits

    def softmax_slopes(self, p: Tensor, token: Tensor, slope: Tensor, dtype: torch.dtype) -> Tensor:
        """slope·(1[token] - p), in `dtype`."""
        out = torch.empty_like(p, dtype=dtype)
        self._functions.softmax_slopes(
            p.data_ptr(), token.data_ptr(), slope.data_ptr(), out.data_ptr(), _is_half(out), *p.shape
        )
        return out

    def attend(self, query: Tensor, key: Tensor, value: Tensor, runs: Runs, scale: float) -> tuple[Tensor, Tensor]:
        """Attention of (N, heads, d) over (N, kv_heads, d), all of one type and with channels side by side; also log of
        the sums of exp of the scores."""
        out, log_sum = query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)
        self._attention("attend_packed", (query, key, value, out), runs, scale, log_sum)
        return out, log_sum

    def attend_slopes(
        self, query: Tensor, key: Tensor, value: Tensor, slope: Tensor, runs: Runs, scale: float, log_sum: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Its gradients, views of one tensor (N, heads + 2 kv_heads, d)."""
        rows, heads, d = query.shape
        whole = query.new_empty((rows, heads + 2 * key.shape[1], d))
        made = whole.split([heads, key.shape[1], key.shape[1]], 1)
        self._attention("attend_packed_slopes", (query, key, value, slope, *made), runs, scale, log_sum)
        return made[0], made[1], made[2]

    def _attention(self, name: str, tensors: Sequence[Tensor], runs: Runs, scale: float, log_sum: Tensor) -> None:
        places = [n for x in tensors for n in (x.data_ptr(), x.stride(0), x.stride(1))]
        heads, kv_heads = tensors[0].shape[1], tensors[1].shape[1]
        shape = (runs.num_groups, heads, kv_heads, tensors[0].shape[2], runs.most)
        getattr(self._functions, name)(
            (ctypes.c_int64 * len(places))(*places), _is_half(tensors[0]), *(x.data_ptr() for x in runs.columns),
            (ctypes.c_int64 * len(shape))(*shape), scale, log_sum.data_ptr(),
        )  # fmt: skip


def kernels_for(*tensors: Tensor | None) -> UpdateKernels | None:
    """The kernels, where they compute with these tensors; None = torch's operations do."""
    if not all(x is None or (is_taken(x) and x.is_contiguous()) for x in tensors):
        return None
    found = _kernels()
    return None if found is None else found.follow_threads()


def is_taken(x: Tensor) -> bool:
    """Whether a tensor is one of memory of this machine, of a type that the kernels read."""
    return x.device.type == "cpu" and x.dtype in TYPES and type(x) in (Tensor, torch.nn.Parameter)


@functools.cache
def _kernels() -> UpdateKernels | None:
    found = library()
    return None if found is None else UpdateKernels(found)


def _is_half(x: Tensor) -> bool:
    return x.dtype is torch.bfloat16


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
