"""Logits in float32, whatever the type of the products: the output layer's inputs in half precision, its result not.

A logit of 20 in bfloat16 has its neighbours 0.125 away. Rounded so, log-probabilities are 0.018 nats off in the mean on
a small chat model, more than all other roundings of a bfloat16 pass together, and differently in sampler and trainer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..kernels.products import FLOAT, PackedWeight, packs
from .attention import core_of
from .precision import HALF

ROWS_HINT = 64  # oneDNN chooses its blocks for a number of rows; any from 8 to 512 gives about the same speed


def half_here(x: Tensor) -> torch.dtype | None:
    """The 16-bit type in which a product of `x` is computed now, by autocast or its own type; None = a wider one."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return dtype if dtype in HALF else None


class WideProduct:
    """(N, hidden) -> (N, V) in float32, the weight as it is now.

    Args:
        weight: (V, hidden), of the 16-bit type in which inputs are taken.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.dtype, self.blocks = weight.detach(), weight.dtype, None
        self.packed: PackedWeight | None = None
        if packs(weight.dtype, [weight]) and weight.shape[1] % 2 == 0:
            self.packed = PackedWeight([weight])
        elif weight.device.type == "cpu" and type(weight.data) is Tensor and has_onednn():
            # Twice the speed of the plain layout.
            self.blocks = torch.ops.mkldnn._reorder_linear_weight(self.weight.float(), ROWS_HINT)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.packed is not None:
            return self.packed(x.contiguous(), FLOAT)
        if self.blocks is None:
            return wide_product(x, self.weight)
        return torch.ops.mkldnn._linear_pointwise(x.float(), self.blocks, None, "none", [], "")  # type: ignore[no-any-return]


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of a 16-bit type, (N, hidden) and (V, hidden), in float32."""
    if x.device.type == "cuda":
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return x.float() @ weight.float().T


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _WideLinear(torch.autograd.Function):
    """The product with its gradient, whose products are of the 16-bit type, as everywhere else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, product: WideProduct) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        slope = gradients[0].to(x.dtype)
        return slope @ weight, slope.T @ x if ctx.needs_input_grad[1] else None, None


class _WideHead:
    """The forward of an output layer inside `wide_logits`."""

    def __init__(self, head: torch.nn.Linear) -> None:
        self.head = head
        # Of the block, on a CPU and without a gradient. A recording on a GPU must hold the cast of each step.
        self.product: WideProduct | None = None

    def __call__(self, x: Tensor) -> Tensor:
        half = half_here(x)
        if half is None:
            return torch.nn.Linear.forward(self.head, x)
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(half)
            if torch.is_grad_enabled() or x.device.type != "cpu":
                weight = self.head.weight.to(half)
                out: Tensor = _WideLinear.apply(rows, weight, WideProduct(weight))
            else:
                if self.product is None or self.product.dtype is not half:
                    self.product = WideProduct(self.head.weight.to(half))
                out = self.product(rows)
            if self.head.bias is not None:
                out = out + self.head.bias
        return out.view(*x.shape[:-1], out.shape[-1])


@contextlib.contextmanager
def wide_logits(model: Any) -> Iterator[None]:
    """Inside the block a plain output layer gives float32, by autocast or in a model of a 16-bit type too. Its weights
    must not change there."""
    head = core_of(model).get_output_embeddings()
    if not is_plain(head) or "forward" in vars(head):
        yield
        return
    head.forward = _WideHead(head)
    try:
        yield
    finally:
        del head.forward


def is_wide_head(layer: Any) -> bool:
    """Whether it is an output layer inside `wide_logits` to which nobody else listens."""
    return isinstance(vars(layer).get("forward"), _WideHead) and not (layer._forward_hooks or layer._forward_pre_hooks)


def is_plain(head: Any) -> bool:
    """Whether the output layer is a linear layer with all its weights here."""
    return type(head) is torch.nn.Linear and type(head.weight.data) is Tensor
