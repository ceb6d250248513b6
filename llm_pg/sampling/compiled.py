"""One token a row through layers in the style of Llama, by the kernels.

Each row of the batch has a slot, which holds its completion's keys and values, and a place in the table of prompts.
Both are looked up for every token: rows that leave move nothing, and rows need not be equally far. The stream between
the layers is float32. Under an autocast to bfloat16 products take bfloat16 where the processor computes in it, and are
rounded where autocast rounds them; attention is in float32, as in the lean layers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.decoding import LANES, Heads, Kernels
from ..kernels.products import ADDED, FLOAT, ROUNDED
from ..model.attention import Layout, core_of, forward
from ..model.lean_layers import LeanLayers
from ..model.linears import Copies
from ..model.wide import WideProduct
from .decoding import FIRST_TOKENS
from .lean import Linear, NotLlamaStyle, check_layer, output_layer, parts_of
from .prompts import PromptTable


class _Product:
    """A product by the kernel where its weights are packed for it; `rows` are its input.

    Args:
        linear: what computes it otherwise. result: FLOAT or ROUNDED, of the kernel.
    """

    def __init__(self, linear: Linear | WideProduct, result: int) -> None:
        self.linear, self.packed, self.result = linear, linear.packed, result

    def rows(self, count: int, width: int) -> Tensor:
        """Memory for `count` rows of its input."""
        if self.packed is None:
            return torch.empty((count, width))
        return torch.empty((count, self.packed.width), dtype=torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x).float().contiguous() if self.packed is None else self.packed(x, self.result)

    def add(self, stream: Tensor, x: Tensor) -> None:
        """Its result is added to `stream`."""
        if self.packed is None:
            stream.add_(self.linear(x))
        else:
            self.packed(x, ADDED, stream)


class _Norm:
    """An RMSNorm whose parts the kernel takes."""

    def __init__(self, kernels: Kernels, norm: Any) -> None:
        self.kernels, self.weight, self.eps = kernels, *norm_parts(norm)

    def __call__(self, x: Tensor, to: Tensor) -> Tensor:
        return self.kernels.norm(x, self.weight, self.eps, to)


def norm_parts(norm: Any) -> tuple[Tensor, float]:
    """Weight and epsilon of an RMSNorm in float32."""
    eps, weight = getattr(norm, "variance_epsilon", None), getattr(norm, "weight", None)
    if eps is None or weight is None or type(weight.data) is not Tensor or weight.dtype != torch.float32:
        raise NotLlamaStyle(f"{type(norm).__name__} is not a plain RMSNorm in float32")
    return weight.detach(), float(eps)


class _CompiledLayer:
    """One decoder layer."""

    def __init__(self, kernels: Kernels, copies: Copies, layer: Any, dtype: torch.dtype | None) -> None:
        check_layer(layer)
        mixer, mlp = layer.self_attn, layer.mlp
        self.kernels, self.mixer, self.act = kernels, mixer, mlp.act_fn
        self.before, self.between = (
            _Norm(kernels, layer.input_layernorm),
            _Norm(kernels, layer.post_attention_layernorm),
        )
        self.qkv, self.out, self.gate_up, self.down = (
            _Product(Linear(*linears, dtype=dtype, copies=copies), ROUNDED)
            for linears in (
                (mixer.q_proj, mixer.k_proj, mixer.v_proj), (mixer.o_proj,), (mlp.gate_proj, mlp.up_proj),
                (mlp.down_proj,),
            )
        )  # fmt: skip
        self.rounded = dtype is torch.bfloat16
        self.is_silu = isinstance(mlp.act_fn, nn.SiLU) or type(mlp.act_fn).__name__ == "SiLUActivation"
        self.norms: tuple[Tensor | None, Tensor | None, float] = (None, None, 0.0)
        if hasattr(mixer, "q_norm"):
            (query, eps), (key, other) = norm_parts(mixer.q_norm), norm_parts(mixer.k_norm)
            if eps != other or {len(query), len(key)} != {mixer.head_dim}:
                raise NotLlamaStyle("its norms of queries and keys are not a head wide")
            self.norms = (query, key, eps)

    def __call__(self, x: Tensor, decoder: CompiledDecoder) -> None:
        """Adds to the stream x (R, hidden)."""
        rows, hidden = x.shape
        d, layer = self.mixer.head_dim, self.mixer.layer_idx
        qkv = self.qkv(self.before(x, self.qkv.rows(rows, hidden)))
        heads = decoder.heads(layer, qkv.shape[1] // d, self.mixer.num_key_value_groups, d)
        read = self.out.rows(rows, heads.heads * d)
        self.kernels.attend(
            qkv, decoder.rotation, self.norms, self.mixer.scaling, decoder.prompts.pairs[layer], decoder.own[layer],
            decoder.where, heads, read, rounded=self.rounded,
        )  # fmt: skip
        self.out.add(x, read)
        both = self.gate_up(self.between(x, self.gate_up.rows(rows, hidden)))
        width = both.shape[1] // 2
        inner = self.down.rows(rows, width)
        if self.is_silu:
            self.kernels.gated(both, inner, rounded=self.rounded)
        else:
            gate, up = both.chunk(2, -1)
            inner[:, :width] = self.act(gate).mul_(up)
            inner[:, width:] = 0
        self.down.add(x, inner)


def in_float32_on_cpu(model: Any) -> bool:
    """Whether the stream between the layers is what the kernels take."""
    embedded = core_of(model).get_input_embeddings().weight
    return bool(embedded.device.type == "cpu" and embedded.dtype == torch.float32)


def _in_blocks(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (N, kv_heads, L, d) as the kernel reads them: keys of 16 tokens together, channel by channel."""
    more = (0, 0, 0, -key.shape[2] % LANES)
    key, value = (torch.nn.functional.pad(x.float(), more) for x in (key, value))
    return key.unflatten(2, (-1, LANES)).transpose(3, 4).contiguous(), value.contiguous()


def _forward(copies: Copies, model: Any, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
    """See `attention.forward`. Prompts are computed as an update computes them, where it writes layers out."""
    try:
        return LeanLayers(model, copies)(ids, positions, layout)
    except NotLlamaStyle:
        return forward(model, ids, positions, layout)


class CompiledDecoder:
    """See `decoding.Decoder`. The weights are those of the moment it is made.

    Raises:
        NotLlamaStyle: the modules are not those of such a model. Whether the numbers agree is for the caller to try.
    """

    keeps_freely = True  # rows leave without a copy

    def __init__(self, model: Any, kernels: Kernels) -> None:
        self.model, self.kernels = model, kernels
        self.base, head, dtype = parts_of(model)
        kernels.follow_threads()
        self.autocast = dtype is not None
        self.copies = Copies(keeps=True)
        self.layers = [_CompiledLayer(kernels, self.copies, layer, dtype) for layer in self.base.layers]
        self.norm = _Norm(kernels, self.base.norm)
        self.head = _Product(output_layer(head, dtype, self.copies), FLOAT)

    def prefill(self, prompts_R: Sequence[tuple[int, ...]]) -> Tensor:
        """See `Decoder`."""
        self.prompts = PromptTable(self.model, _in_blocks, functools.partial(_forward, self.copies))
        self.own: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values of each slot's completion
        self.capacity = FIRST_TOKENS
        self.num_slots = len(prompts_R)
        self.slot_R = torch.arange(self.num_slots)
        self.place_R = torch.zeros_like(self.slot_R)
        return self.refill(self.slot_R, prompts_R)

    def refill(self, slot_N: Tensor, prompts_N: Sequence[tuple[int, ...]]) -> Tensor:
        """See `Decoder`."""
        others = torch.ones_like(self.place_R, dtype=torch.bool)
        others[slot_N] = False
        place_N = self.prompts.enter(prompts_N, self.place_R[others])
        self.place_R[slot_N] = place_N
        return self.prompts.first_PV[place_N]

    def keep(self, index: Tensor) -> None:
        """See `Decoder`."""
        self.slot_R, self.place_R = self.slot_R[index], self.place_R[index]

    def step(self, next_R: Tensor, depth_R: Tensor) -> Tensor:
        """See `Decoder`."""
        if int(depth_R.max()) >= self.capacity:
            self._grow()
        length_R = self.prompts.length_P[self.place_R]
        self.where = torch.stack([self.slot_R, self.place_R, length_R, depth_R])
        if not self.autocast:
            return self._logits(next_R, length_R + depth_R)
        with torch.autocast("cpu", enabled=False):
            return self._logits(next_R, length_R + depth_R)

    def _logits(self, next_R: Tensor, position_R: Tensor) -> Tensor:
        x = self.base.embed_tokens(next_R)
        cos, sin = self.base.rotary_emb(x, position_ids=position_R.unsqueeze(0))
        cos, sin = cos[0].float().contiguous(), sin[0].float().contiguous()
        sin[:, : sin.shape[1] // 2].neg_()
        self.rotation = cos, sin
        for layer in self.layers:
            layer(x, self)
        return self.head(self.norm(x, self.head.rows(*x.shape)))

    def heads(self, layer: int, num: int, queries_a_key: int, d: int) -> Heads:
        """Sizes of the attention of a layer with `num` heads of queries, keys and values."""
        if self.rotation[0].shape != (len(self.slot_R), d) or d % 4:
            raise NotLlamaStyle("its rotation is not a head wide, or a head no multiple of 4")
        kv_heads = num // (queries_a_key + 2)
        if layer not in self.own:
            slots = self.num_slots
            key, value = (slots, kv_heads, self.capacity // LANES, d, LANES), (slots, kv_heads, self.capacity, d)
            self.own[layer] = (torch.empty(key), torch.empty(value))
        width = self.prompts.pairs[layer][1].shape[2]
        return Heads(len(self.slot_R), num - 2 * kv_heads, kv_heads, d, width, self.capacity)

    def _grow(self) -> None:
        for layer, pair in self.own.items():
            wider = [x.new_empty((*x.shape[:2], 2 * x.shape[2], *x.shape[3:])) for x in pair]
            for new, old in zip(wider, pair, strict=True):
                new[:, :, : old.shape[2]] = old
            self.own[layer] = (wider[0], wider[1])
        self.capacity *= 2
