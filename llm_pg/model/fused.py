"""Parts of a Llama-style layer as one operation each, with gradients of their own.

Automatic differentiation keeps a tensor for each of the five steps of a norm and makes four more in the backward pass;
here each part keeps its input and makes its gradient in place. Numbers between products are float32 and are rounded
once, where a product takes them. On a CPU each part is one pass over memory, by `kernels`, where there is a compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.products import HALF as INTO_HALF
from ..kernels.products import PackedWeight, packs
from ..kernels.update import TYPES, kernels_for
from .precision import HALF
from .wide import has_onednn

ROWS_HINT = 64  # oneDNN chooses its blocks for a number of rows; any from 8 to 1,024 gives about the same speed
# Below this many rows oneDNN may sum in another order (one row of 1,536 does), so that a row's result would depend on
# what is computed beside it.
LEAST_ROWS = 8


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
        d_normed, unit = _wide(d_normed), total * rate
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
            out, both = x.clone(), _wide(x[:, :rotated])
            out[:, :rotated] = torch.addcmul(both * cos, both.roll(x.shape[-1] // 2, -1), sin)
        return out[:, :heads], out[:, heads:rotated], out[:, rotated:]

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        (cos, sin), rotated = ctx.saved_tensors, ctx.rotated
        slope = side_by_side(slopes)
        kernels = kernels_for(slope, cos, sin)
        if kernels is not None and cos.dtype is sin.dtype is torch.float32:
            return kernels.rotate(slope, cos, sin, rotated, back=True), None, None, None, None
        out, both = slope.clone(), _wide(slope[:, :rotated])
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


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALF else x


class Copy:
    """The weights of linear layers of one input as one matrix, of the type in which they are multiplied.

    Args:
        layers: their biases are zero where only some have one.
        dtype: of the products' inputs.
    """

    def __init__(self, layers: Sequence[nn.Linear], dtype: torch.dtype) -> None:
        weights, biases = [layer.weight.detach() for layer in layers], [layer.bias for layer in layers]
        self.versions, self.dtype, self.weights = _versions(layers), dtype, weights
        self.blocks: Tensor | None = None
        self.packed: PackedWeight | None = None
        if packs(dtype, weights):
            self.packed = PackedWeight(weights, biases)
            return
        self.bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            parts = [w.new_zeros(len(w)) if b is None else b.detach() for w, b in zip(weights, biases, strict=True)]
            self.bias = torch.cat(parts).to(dtype)
        if weights[0].device.type == "cpu" and has_onednn() and dtype is not torch.float64:
            self.type = dtype if dtype in _block_types() else torch.float32
            self.blocks = torch.ops.mkldnn._reorder_linear_weight(self.plain.to(self.type), ROWS_HINT)
            self.blocks_bias = None if self.bias is None else self.bias.to(self.type)

    @functools.cached_property
    def plain(self) -> Tensor:
        """The matrix as it is, which the backward pass takes, before the weights change."""
        typed = [weight.to(self.dtype) for weight in self.weights]
        return typed[0] if len(typed) == 1 else torch.cat(typed)

    def __call__(self, x: Tensor) -> Tensor:
        """x W^T + b; on a CPU of a row the same numbers whatever is beside it."""
        if self.packed is not None:
            return self.packed(F.pad(x, (0, self.packed.width - x.shape[1])).contiguous(), INTO_HALF)
        if self.blocks is None:
            return F.linear(x, self.plain, self.bias)
        rows = len(x)
        if rows < LEAST_ROWS:
            x = torch.cat([x, x.new_zeros(LEAST_ROWS - rows, x.shape[1])])
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(self.type), self.blocks, self.blocks_bias, "none", [], "")
        return out[:rows].to(x.dtype)


def _block_types() -> tuple[torch.dtype, ...]:
    """Types in which oneDNN multiplies at its best: bfloat16 where the processor computes in it. Others are rounded to
    their own type and multiplied in float32."""
    own = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if own else (torch.float32,)


def _versions(layers: Iterable[nn.Linear]) -> list[int]:
    return [p._version for layer in layers for p in layer.parameters()]


class Copies:
    """Copies of weights for products: made when they are asked for, kept inside `held`.

    What changes weights inside the block must say so by `forget`, unless torch counts it in the tensors' versions.

    Args:
        keeps: keep them always.
    """

    def __init__(self, *, keeps: bool = False) -> None:
        self._made: dict[tuple[Any, ...], Copy] = {}
        self._depth = int(keeps)

    def of(self, layers: Sequence[nn.Linear], dtype: torch.dtype) -> Copy:
        """The copy of these layers' weights as they are now."""
        key = (dtype, *map(id, layers))
        copy = self._made.get(key)
        if copy is None or copy.versions != _versions(layers):
            copy = Copy(layers, dtype)
            if self._depth:
                self._made[key] = copy
        return copy

    def forget(self) -> None:
        """Drops all copies: the weights have changed."""
        self._made.clear()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Copies made inside the block stay until its end."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.forget()


class Product(torch.autograd.Function):
    """x W^T + b of a `Copy`, with gradients of the layers' own weights and biases.

    Args:
        x: (N, in), of the copy's type. parameters: the weights of the layers in order, then their biases, with None
            for a layer that has none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, copy: Copy, *parameters: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.copy, ctx.types = copy, [None if p is None else p.dtype for p in parameters]
        ctx.widths = [len(p) for p in parameters[: len(parameters) // 2] if p is not None]
        return copy(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        (x,), slope = ctx.saved_tensors, slopes[0]
        needed, number = ctx.needs_input_grad, len(ctx.widths)
        d_x = slope @ ctx.copy.plain if needed[0] else None
        of_parameters: list[Tensor | None] = [None] * (2 * number)
        if any(needed[2 : 2 + number]):
            of_parameters[:number] = (slope.T @ x).split(ctx.widths)
        if any(needed[2 + number :]):
            of_parameters[number:] = _wide(slope).sum(0).split(ctx.widths)
        typed = [
            None if g is None or not need else g.to(dtype)
            for g, need, dtype in zip(of_parameters, needed[2:], ctx.types, strict=True)
        ]
        return d_x, None, *typed
