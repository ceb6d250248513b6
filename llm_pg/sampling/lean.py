"""One token a row through layers in the style of Llama, without what the library does around each of them.

At one token a row a small model's step is overhead, and weights on their way from memory. So the norms, the rotation
and the residuals are written out, and on a CPU the weights are laid out anew for each batch of completions, in the
blocks in which oneDNN reads them, those that share their input as one (1.5 to 3 times the speed of the plain layout at
4 to 64 rows). Under an autocast to bfloat16 the blocks are of that type, which halves what comes from memory; what is
between the products stays in float32, as does attention, whose products are too small to gain. Anything that is not a
linear layer, plain or with LoRA, is called unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.products import PackedWeight
from ..model.attention import Layout, body_of, core_of
from ..model.lean_layers import NotLlamaStyle, require_parts
from ..model.linears import Copies, Copy, LinearParts, parts_of_linear, product
from ..model.precision import HALF
from ..model.wide import WideProduct, has_onednn, is_plain, is_wide_head

NORMS = ("input_layernorm", "post_attention_layernorm")


class Linear:
    """Linear layers of the same input as one: (R, in) -> (R, sum of outs), of the input's type.

    Args:
        layers: of that input. dtype: of the products; None = that of the weights. copies: of weights on a CPU.
    """

    def __init__(self, *layers: Any, dtype: torch.dtype | None = None, copies: Copies | None = None) -> None:
        self.layers, self.copies = layers, copies or Copies(keeps=True)
        self.copy: Copy | None = None
        parts = [LinearParts(x) if is_wide_head(x) else parts_of_linear(x) for x in layers]
        self.parts = [part for part in parts if part is not None]
        linears = [linear for part in self.parts for linear in part.layers()]
        self.dtype = dtype or layers[0].weight.dtype
        # Sharded weights (DTensor) are left alone.
        here = all(type(x.weight.data) is Tensor and x.weight.device.type == "cpu" for x in linears)
        if len(self.parts) < len(layers) or not here or not has_onednn() or self.dtype is torch.float64:
            self.parts = []
        elif len(linears) == len(layers):
            self.copy = self.copies.of(linears, self.dtype)

    @property
    def packed(self) -> PackedWeight | None:
        """The weights for the kernel of products; None = it does not compute them."""
        return None if self.copy is None else self.copy.packed

    def __call__(self, x: Tensor) -> Tensor:
        if self.copy is not None:
            return self.copy(x.to(self.dtype)).to(x.dtype)
        if self.parts:
            return product(self.parts, x.to(self.dtype), self.copies).to(x.dtype)
        if len(self.layers) == 1:
            return self.layers[0](x)  # type: ignore[no-any-return]
        return torch.cat([layer(x) for layer in self.layers], -1)


class _Layer:
    """One decoder layer, its parts checked."""

    def __init__(self, layer: Any, dtype: torch.dtype | None = None) -> None:
        check_layer(layer)
        mixer, mlp = layer.self_attn, layer.mlp
        self.before, self.between, self.mixer, self.act = (
            layer.input_layernorm, layer.post_attention_layernorm, mixer, mlp.act_fn,
        )  # fmt: skip
        self.qkv = Linear(mixer.q_proj, mixer.k_proj, mixer.v_proj, dtype=dtype)
        self.out, self.down = Linear(mixer.o_proj, dtype=dtype), Linear(mlp.down_proj, dtype=dtype)
        self.gate_up = Linear(mlp.gate_proj, mlp.up_proj, dtype=dtype)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        mixer, rows, d = self.mixer, len(x), self.mixer.head_dim
        qkv = self.qkv(_norm(self.before, x)).view(rows, -1, d)
        kv_heads = qkv.shape[1] // (mixer.num_key_value_groups + 2)
        heads = qkv.shape[1] - 2 * kv_heads
        both, value = qkv[:, :-kv_heads], qkv[:, -kv_heads:].unsqueeze(2)
        if hasattr(mixer, "q_norm"):
            both = torch.cat([_norm(mixer.q_norm, both[:, :heads]), _norm(mixer.k_norm, both[:, heads:])], 1)
        both = torch.addcmul(both * cos, both.roll(d // 2, -1), sin).unsqueeze(2)
        read = layout.attend(mixer.layer_idx, both[:, :heads], both[:, heads:], value, mixer.scaling)
        x = x + self.out(read.reshape(rows, -1))
        gate, up = self.gate_up(_norm(self.between, x)).chunk(2, -1)
        return x + self.down(self.act(gate).mul_(up))


def check_layer(layer: Any) -> None:
    """Raises `NotLlamaStyle` where it is built of other parts."""
    require_parts(layer, ("self_attn", "mlp", *NORMS))
    mixer, mlp = layer.self_attn, layer.mlp
    require_parts(mixer, ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "layer_idx"))
    require_parts(mlp, ("gate_proj", "up_proj", "down_proj", "act_fn"))
    known = {"self_attn", "mlp", *NORMS, "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
    others = {name for part in (layer, mixer) for name, _ in part.named_children()} - known
    if others:
        raise NotLlamaStyle(f"{type(layer).__name__} also has {', '.join(sorted(others))}")


def parts_of(model: Any) -> tuple[Any, Any, torch.dtype | None]:
    """Its body, its output layer, and on a CPU the type of products where autocast is on, which is then switched off
    for everything else in a step."""
    core = core_of(model)
    base, head = body_of(core), core.get_output_embeddings()
    require_parts(base, ("embed_tokens", "layers", "norm", "rotary_emb"))
    on = core.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return base, head, torch.get_autocast_dtype("cpu") if on else None


class LeanDecoder:
    """The decoder of `model` with its weights as they are now.

    Raises:
        NotLlamaStyle: the modules are not those of such a model. Whether the numbers agree is for the caller to try.
    """

    def __init__(self, model: Any) -> None:
        self.base, head, self.dtype = parts_of(model)
        self.head = output_layer(head, self.dtype)
        self.layers: Sequence[_Layer] = [_Layer(layer, self.dtype) for layer in self.base.layers]

    def logits(self, ids_R: Tensor, position_R: Tensor, layout: Layout) -> Tensor:
        """(R, V) after one token a row at `position_R`, with the attention of `layout`."""
        if self.dtype is None:
            return self._logits(ids_R, position_R, layout)
        with torch.autocast("cpu", enabled=False):
            return self._logits(ids_R, position_R, layout)

    def _logits(self, ids_R: Tensor, position_R: Tensor, layout: Layout) -> Tensor:
        x = self.base.embed_tokens(ids_R)
        cos, sin = (t.transpose(0, 1) for t in self.base.rotary_emb(x, position_ids=position_R.unsqueeze(0)))
        half = cos.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        for layer in self.layers:
            x = layer(x, cos, sin, layout)
        return self.head(_norm(self.base.norm, x))


def output_layer(head: Any, dtype: torch.dtype | None, copies: Copies | None = None) -> Linear | WideProduct:
    """The output layer, in float32 where its inputs are of a 16-bit type."""
    half = dtype or head.weight.dtype
    on_cpu = head.weight.device.type == "cpu" and has_onednn()
    if not (on_cpu and half in HALF and is_plain(head) and head.bias is None):
        return Linear(head, dtype=dtype, copies=copies)
    return WideProduct(head.weight.to(half))


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    eps = getattr(norm, "variance_epsilon", None)
    if eps is None or x.dtype != torch.float32:
        out: Tensor = norm(x)
        return out
    return F.rms_norm(x, x.shape[-1:], norm.weight, eps)  # type: ignore[arg-type]
