"""Linear layers of one input as one product, plain or with LoRA: the same numbers in decoding and in an update.

On a CPU weights are laid out anew for the products, once for all passes of a step or a batch. A LoRA layer is its base
and two thin products, as PEFT computes it; through PEFT's own module it would cast and multiply the plain weight for
every token.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.products import HALF as INTO_HALF
from ..kernels.products import PackedWeight, joined_biases, packs
from .fused import wide
from .wide import has_onednn

ROWS_HINT = 64  # oneDNN chooses its blocks for a number of rows; any from 8 to 1,024 gives about the same speed
# Below this many rows oneDNN may sum in another order (one row of 1,536 does), so that a row's result would depend on
# what is computed beside it.
LEAST_ROWS = 8


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
        bias = joined_biases(weights, biases)
        self.bias = None if bias is None else bias.to(dtype)
        if weights[0].device.type == "cpu" and has_onednn() and dtype is not torch.float64:
            self.type = dtype if dtype in _block_types() else torch.float32
            self.blocks = torch.ops.mkldnn._reorder_linear_weight(self._joined().to(self.type), ROWS_HINT)
            self.blocks_bias = None if self.bias is None else self.bias.to(self.type)

    @functools.cached_property
    def plain(self) -> Tensor:
        """The matrix as it is, which the backward pass takes, before the weights change."""
        return self._joined()

    def _joined(self) -> Tensor:
        typed = [weight.to(self.dtype) for weight in self.weights]
        return typed[0] if len(typed) == 1 else torch.cat(typed)

    def slopes(self, slope: Tensor) -> Tensor:
        """The gradient by x of that by x W^T + b; of the weights themselves where no other copy is there anyway."""
        if self.blocks is None or any(weight.dtype != self.dtype for weight in self.weights):
            return slope @ self.plain
        pieces = slope.split([len(weight) for weight in self.weights], -1)
        d_x = pieces[0] @ self.weights[0]
        for piece, weight in zip(pieces[1:], self.weights[1:], strict=True):
            d_x.addmm_(piece, weight)
        return d_x

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
        d_x = ctx.copy.slopes(slope) if needed[0] else None
        of_parameters: list[Tensor | None] = [None] * (2 * number)
        if any(needed[2 : 2 + number]):
            of_parameters[:number] = (slope.T @ x).split(ctx.widths)
        if any(needed[2 + number :]):
            of_parameters[number:] = wide(slope).sum(0).split(ctx.widths)
        typed = [
            None if g is None or not need else g.to(dtype)
            for g, need, dtype in zip(of_parameters, needed[2:], ctx.types, strict=True)
        ]
        return d_x, None, *typed


@dataclass(frozen=True)
class LinearParts:
    """A linear layer, and what LoRA adds to it: scaling * up(down(x)).

    Attributes:
        base: the layer itself. down, up: of LoRA; None = there is none, or it is switched off.
        scaling: of their product.
    """

    base: nn.Linear
    down: nn.Linear | None = None
    up: nn.Linear | None = None
    scaling: float = 1.0

    def layers(self) -> list[nn.Linear]:
        """All of them."""
        return [layer for layer in (self.base, self.down, self.up) if layer is not None]


def parts_of_linear(layer: Any) -> LinearParts | None:
    """Of a plain linear layer or one with LoRA; None = it is something else, or somebody listens to it."""
    if type(layer) is nn.Linear:
        return None if is_heard(layer) else LinearParts(layer)
    lora = sys.modules.get("peft.tuners.lora.layer")  # there is none of its layers before it is imported
    if lora is None or type(layer) is not lora.Linear or is_heard(layer) or layer.merged or layer.fan_in_fan_out:
        return None
    parts, active = LinearParts(layer.base_layer), [x for x in layer.active_adapters if x in layer.lora_A]
    if not layer.disable_adapters and active:
        name = active[0]
        drops = layer.training and getattr(layer.lora_dropout[name], "p", 0.0) > 0
        if len(active) > 1 or name in layer.lora_variant or drops:
            return None
        parts = LinearParts(layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.scaling[name])
    return parts if all(type(x) is nn.Linear and not is_heard(x) for x in parts.layers()) else None


def is_heard(module: nn.Module) -> bool:
    """Whether somebody looks at, or changes, what goes through a module."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def product(parts: Sequence[LinearParts], x: Tensor, copies: Copies) -> Tensor:
    """Layers of the same input as one.

    Args:
        x: (N, in), of the type of the products.

    Returns:
        (N, sum of outs), of that type.
    """
    out = _plain([part.base for part in parts], x, copies)
    downs = [part.down for part in parts if part.down is not None]
    if not downs:
        return out
    inner = iter(_plain(downs, x, copies).split([down.out_features for down in downs], 1))
    outs = list(out.split([part.base.out_features for part in parts], 1))
    for place, part in enumerate(parts):
        if part.up is not None:
            outs[place] = outs[place] + _plain([part.up], next(inner), copies) * part.scaling
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def _plain(layers: Sequence[nn.Linear], x: Tensor, copies: Copies) -> Tensor:
    parameters = [*(layer.weight for layer in layers), *(layer.bias for layer in layers)]
    return Product.apply(x, copies.of(layers, x.dtype), *parameters)  # type: ignore[no-any-return]
