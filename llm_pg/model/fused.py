"""Parts of a Llama-style layer as one operation each, with gradients of their own.

Automatic differentiation keeps a tensor for each of the five steps of a norm and makes four more in the backward pass;
here each part keeps its input and makes its gradient in place. Numbers between products are float32 and are rounded
once, where a product takes them. On a CPU each part is one pass over memory, by `kernels`, where there is a compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.update import TYPES, kernels_for
from .precision import HALF


class AddNorm(torch.autograd.Function):
    """x + delta, and its RMS norm times a weight, rounded to `dtype`.

    Args:
        x: (N, d). delta: (N, d), of any type; None = nothing is added. weight: (d,). eps: beside the mean square.
        dtype: of the norm; None = that of x.

    Returns:
        The sum (x itself where nothing is added), and the norm.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        kernels = kernels_for(x, delta, weight)
        if kernels is not None and x.dtype is weight.dtype is torch.float32 and dtype in (None, *TYPES):
            total, rate, normed = kernels.add_norm(x, delta, weight, eps, dtype or x.dtype)
        else:
            total = x if delta is None else x + delta
            rate = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps)
            normed = (total * rate).mul_(weight)
            normed = normed if dtype is None else normed.to(dtype)
        ctx.save_for_backward(total, rate, weight)
        ctx.delta_type = None if delta is None else delta.dtype
        return x.view_as(x) if delta is None else total, normed

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        total, rate, weight = ctx.saved_tensors
        d_total, d_normed = slopes
        kernels = kernels_for(total, weight, d_total, d_normed)
        is_float = total.dtype is weight.dtype is d_total.dtype is torch.float32
        if kernels is not None and is_float and ctx.delta_type in (None, *TYPES):
            of_weight = ctx.needs_input_grad[2]
            made = kernels.add_norm_slopes(total, rate, weight, d_normed, d_total, ctx.delta_type, of_weight=of_weight)
            return *made, None, None
        d_normed, unit = wide(d_normed), total * rate
        by_unit = unit * d_normed
        d_weight = by_unit.sum(0) if ctx.needs_input_grad[2] else None
        share = (by_unit @ weight).unsqueeze(-1).div_(-len(weight))
        d_x = torch.addcmul(d_normed * weight, unit, share).mul_(rate).add_(d_total)
        return d_x, None if ctx.delta_type is None else d_x.to(ctx.delta_type), d_weight, None, None


class SwiGlu(torch.autograd.Function):
    """silu(gate)·up of (N, 2 f), gate and up beside each other: (N, f), of their type."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        kernels = kernels_for(gate_up)
        if kernels is not None:
            ctx.save_for_backward(gate_up)
            return kernels.gate(gate_up)
        gate, up = gate_up.chunk(2, -1)
        opened = F.silu(gate)
        ctx.save_for_backward(gate_up, opened)
        return opened * up

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        (gate_up, *opened), (slope,) = ctx.saved_tensors, slopes
        kernels = None if opened else kernels_for(gate_up)
        if kernels is not None:
            return kernels.gate_slopes(gate_up, slope.contiguous())
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        d_gate, d_up = out.chunk(2, -1)
        torch.ops.aten.silu_backward.grad_input(slope * up, gate, grad_input=d_gate)
        torch.mul(opened[0], slope, out=d_up)
        return out


class Rotated(torch.autograd.Function):
    """Queries, keys and values of (N, all, d), views of one tensor: the first `heads` and `kv_heads` of all rotated, in
    float32 or wider and rounded once, the others as they are.

    Args:
        cos, sin: (N, 1, d), sin with the sign of each half.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.rotated = rotated = heads + kv_heads
        kernels = kernels_for(x, cos, sin)
        if kernels is not None and cos.dtype is sin.dtype is torch.float32:
            out = kernels.rotate(x, cos, sin, rotated)
        else:
            out, both = x.clone(), wide(x[:, :rotated])
            out[:, :rotated] = torch.addcmul(both * cos, both.roll(x.shape[-1] // 2, -1), sin)
        return out[:, :heads], out[:, heads:rotated], out[:, rotated:]

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        (cos, sin), rotated = ctx.saved_tensors, ctx.rotated
        slope = side_by_side(slopes)
        kernels = kernels_for(slope, cos, sin)
        if kernels is not None and cos.dtype is sin.dtype is torch.float32:
            return kernels.rotate(slope, cos, sin, rotated, back=True), None, None, None, None
        out, both = slope.clone(), wide(slope[:, :rotated])
        out[:, :rotated] = (both * sin).roll(out.shape[-1] // 2, -1).addcmul_(both, cos)
        return out, None, None, None, None


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (N, own, d) as one (N, all, d): without a copy where they are its views."""
    first, every, d = parts[0], sum(part.shape[1] for part in parts), parts[0].shape[2]
    offset, whole = first.storage_offset(), (every * d, d, 1)
    for part in parts:
        lies = part.untyped_storage()._cdata == first.untyped_storage()._cdata and part.storage_offset() == offset
        if not lies or part.stride() != whole:
            return torch.cat(list(parts), 1)
        offset += part.shape[1] * d
    return first.as_strided((len(first), every, d), whole)


def wide(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x.float() if x.dtype in HALF else x
