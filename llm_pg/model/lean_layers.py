"""The layers of a Llama-style model written out, for passes with a gradient over rows without padding.

Of an update of a small model more than half the time is not matrix products. Here a layer is about ten operations in
place of about sixty: queries, keys and values are one product, as are gate and up; norms, rotation and the gated unit
are one operation each (`fused`); weights are cast once for all passes of a step. What lies between the products stays
in float32. LoRA goes the same way (`linears`); any other layer, another adapter for example, is called unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .attention import Layout, body_of, core_of, recomputes, window_of
from .fused import AddNorm, Rotated, SwiGlu
from .linears import LEAST_ROWS, Copies, is_heard, parts_of_linear, product

NORMS = ("input_layernorm", "post_attention_layernorm")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class NotLlamaStyle(ValueError):
    """The model's layers are built of other parts, or somebody listens to them."""


class LeanLayers:
    """The layers of `model`, as they are now.

    Args:
        model: a transformers model or a PEFT model.
        copies: of its weights.

    Raises:
        NotLlamaStyle: the modules are not those of such a model. Whether the numbers agree is for the caller to try.
    """

    def __init__(self, model: Any, copies: Copies) -> None:
        core = core_of(model)
        base = body_of(core)
        require_parts(base, ("embed_tokens", "layers", "norm", "rotary_emb"))
        if window_of(model) is not None or recomputes(model):
            raise NotLlamaStyle("it has windows, or recomputes its layers")
        for module in (base, *base.layers, *(part for layer in base.layers for part in layer.children())):
            _unheard(module)
        kind = next(base.parameters()).device.type
        self.kind, self.base, self.copies = kind, base, copies
        self.half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.layers = [_WrittenOutLayer(layer) for layer in base.layers]
        self.norm = _norm(base.norm)

    def __call__(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """See `attention.forward`."""
        x = ids if ids.is_floating_point() else self.base.embed_tokens(ids)
        if x.dtype not in (torch.float32, torch.float64):
            raise NotLlamaStyle("its residual stream is of a 16-bit type")
        shape = x.shape
        cos, sin = (t.reshape(-1, 1, t.shape[-1]) for t in self.base.rotary_emb(x, position_ids=positions))
        half = cos.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        x, delta = x.flatten(0, 1), None
        with torch.autocast(self.kind, enabled=False):
            for layer in self.layers:
                x, delta = layer(self, x, delta, cos, sin, layout, shape[:2])
            _, normed = AddNorm.apply(x, delta, *self.norm, None)
        return normed.view(shape)  # type: ignore[no-any-return]

    def product(self, layers: Sequence[Any], x: Tensor) -> Tensor:
        """Linear layers of the same input as one: (N, in) -> (N, sum of outs)."""
        parts = [parts_of_linear(layer) for layer in layers]
        known = [part for part in parts if part is not None]
        if len(known) == len(parts):
            return product(known, x, self.copies)
        if len(layers) > 1:
            return torch.cat([self.product([layer], x) for layer in layers], -1)
        rows = len(x)
        if rows < LEAST_ROWS:
            x = torch.cat([x, x.new_zeros(LEAST_ROWS - rows, x.shape[1])])
        with torch.autocast(self.kind, self.half, enabled=self.half is not None):
            return layers[0](x)[:rows]  # type: ignore[no-any-return]


class _WrittenOutLayer:
    """One decoder layer, its parts checked."""

    def __init__(self, layer: Any) -> None:
        require_parts(layer, ("self_attn", "mlp", *NORMS))
        mixer, mlp = layer.self_attn, layer.mlp
        require_parts(mixer, (*PROJECTIONS, "head_dim", "scaling", "layer_idx"))
        require_parts(mlp, ("gate_proj", "up_proj", "down_proj", "act_fn"))
        known = {"self_attn", "mlp", *NORMS, *PROJECTIONS, "q_norm", "k_norm", "gate_proj", "up_proj", "down_proj"}
        others = {name for part in (layer, mixer, mlp) for name, _ in part.named_children()} - known - {"act_fn"}
        own = [name for part in (layer, mixer, mlp) for name in part._parameters]
        if others or own:
            raise NotLlamaStyle(f"{type(layer).__name__} also has {', '.join(sorted([*others, *own]))}")
        if type(mlp.act_fn) not in (nn.SiLU, type(ACT2FN["silu"])):
            raise NotLlamaStyle(f"its activation is {type(mlp.act_fn).__name__}")
        if mixer.training and getattr(mixer, "attention_dropout", 0.0):
            raise NotLlamaStyle("its attention has dropout")
        self.mixer, self.mlp = mixer, mlp
        self.before, self.between = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.of_heads = [_norm(getattr(mixer, name)) for name in ("q_norm", "k_norm") if hasattr(mixer, name)]

    def __call__(
        self,
        whole: LeanLayers,
        x: Tensor,
        delta: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        layout: Layout,
        shape: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """The residual stream x + delta and what this layer's last part adds to it.

        shape: rows and tokens a row, which x has in one dimension.
        """
        product, mixer, mlp, half = whole.product, self.mixer, self.mlp, whole.half
        x, normed = AddNorm.apply(x, delta, *self.before, half)
        qkv = product((mixer.q_proj, mixer.k_proj, mixer.v_proj), normed).view(len(x), -1, mixer.head_dim)
        kv_heads = qkv.shape[1] // (mixer.num_key_value_groups + 2)
        heads = qkv.shape[1] - 2 * kv_heads
        if self.of_heads:
            qkv = self._normed_heads(qkv, heads, kv_heads)
        query, key, value = Rotated.apply(qkv, cos, sin, heads, kv_heads)
        query, key, value = (t.view(*shape, -1, mixer.head_dim).transpose(1, 2) for t in (query, key, value))
        read = layout.attend(mixer.layer_idx, query, key, value, mixer.scaling).reshape(len(x), -1)
        delta = product((mixer.o_proj,), read.to(normed.dtype))
        x, normed = AddNorm.apply(x, delta, *self.between, half)
        inner = SwiGlu.apply(product((mlp.gate_proj, mlp.up_proj), normed))
        return x, product((mlp.down_proj,), inner)

    def _normed_heads(self, qkv: Tensor, heads: int, kv_heads: int) -> Tensor:
        parts = list(qkv.split([heads, kv_heads, kv_heads], 1))
        wide = torch.promote_types(qkv.dtype, torch.float32)
        for place, norm in enumerate(self.of_heads):
            flat = parts[place].to(wide).flatten(0, 1)
            parts[place] = AddNorm.apply(flat, None, *norm, None)[1].view(parts[place].shape)
        return torch.cat([part.to(wide) for part in parts], 1).to(qkv.dtype)


def require_parts(module: Any, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise NotLlamaStyle(f"{type(module).__name__} has no {', '.join(missing)}")


def _norm(norm: Any) -> tuple[Tensor, float]:
    """Its weight and epsilon."""
    require_parts(norm, ("weight", "variance_epsilon"))
    _unheard(norm)
    return norm.weight, norm.variance_epsilon


def _unheard(module: nn.Module) -> None:
    if is_heard(module):
        raise NotLlamaStyle(f"somebody listens to {type(module).__name__}")
