"""A layout of our own inside the models of transformers: it brings its attention, the model brings everything else.

Tokens are in one row without padding, so every linear layer sees only tokens that count; which token attends to
which is known to the layout alone, through transformers' registry of attention functions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import AttentionInterface

from ..distributed.tensors import core_of

NAME = "llm_pg_layout"
# What a model raises in a trial that gives it something it was not written for: a cache, positions, a mask, no mask.
FAULTS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)


class Layout(Protocol):
    """Which token attends to which."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention of one layer: (rows, heads, N, d), keys and values with their own number of heads; returns
        (rows, N, heads, d)."""
        ...


@runtime_checkable
class SpecialLayout(Layout, Protocol):
    """A layout that computes more of attention than its scores' softmax; special: what, as transformers names it."""

    special: frozenset[str]

    def attend_special(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, special: dict[str, Any]
    ) -> Tensor:
        """As `attend`, with values for some of the names in `special`."""
        ...


class UnsupportedAttention(ValueError):
    """The model's attention has something that a layout does not compute (soft caps, windows, sinks)."""


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | SpecialLayout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    special = {name: others[name] for name in ("softcap", "sliding_window", "s_aux") if others.get(name) is not None}
    extra = [name for name in special if name not in getattr(layout, "special", ())]
    if layout is None or extra or dropout:
        raise UnsupportedAttention(
            f"{type(module).__name__} asks for attention that packing does not compute "
            f"({', '.join(extra) or ('dropout' if dropout else 'no layout arrived')}). Use train.packing: padded."
        )
    if special:
        assert isinstance(layout, SpecialLayout)
        return layout.attend_special(module.layer_idx, query, key, value, scaling, special), None
    return layout.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(NAME, _attention)


def body_of(model: Any) -> Any:
    """The model without its output layer; the model itself where it has no such part."""
    core = core_of(model)
    return core.base_model if core.base_model is not core else getattr(core, "model", core)  # of Llama-4's text


@contextlib.contextmanager
def _own_attention(core: Any) -> Iterator[None]:
    body, before = body_of(core), core.config._attn_implementation
    core.config._attn_implementation = NAME
    # Some models look for padding among ids without a mask, to warn of it, and wait for the answer. A layout has none.
    body.warn_if_padding_and_no_attention_mask = lambda *_: None
    try:
        yield
    finally:
        core.config._attn_implementation = before
        del body.warn_if_padding_and_no_attention_mask


def forward(model: Any, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
    """Last hidden states of `ids` (rows, N), or of embeddings (rows, N, hidden), at `positions`: (rows, N, hidden).

    layout: which of them attend to which.
    """
    core = core_of(model)
    given = {"inputs_embeds" if ids.is_floating_point() else "input_ids": ids}
    with _own_attention(core):
        out = body_of(core)(**given, position_ids=positions, use_cache=False, layout=layout)
    hidden: Tensor = out.last_hidden_state
    return hidden


def attends(model: Any) -> bool:
    """Every token attends to those before it, to all or within a window, in every layer, as far as the config tells."""
    core = core_of(model)
    kinds = set(getattr(core.config.get_text_config(), "layer_types", None) or [])
    return kinds <= {"full_attention", "sliding_attention"} and body_of(core) is not core


def window_of(model: Any) -> int | None:
    """The tokens that a layer with a sliding window sees; None = every layer sees all, as far as the config tells."""
    config = core_of(model).config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    used = getattr(config, "use_sliding_window", True) if kinds is None else "sliding_attention" in kinds
    window: int | None = getattr(config, "sliding_window", None)
    return window if used else None


def recomputes(model: Any) -> bool:
    """Whether layers run again in the backward pass; they would then look for the attention after it was put back."""
    return any(getattr(module, "gradient_checkpointing", False) for module in core_of(model).modules())


def grouped(query: Tensor, kv_heads: int) -> Tensor:
    """(R, heads, n, d) -> (R, kv_heads, heads/kv_heads · n, d): the queries that read one key head, together."""
    rows, heads, n, d = query.shape
    return query.reshape(rows, kv_heads, heads // kv_heads * n, d)


def eval_mode(model: Any) -> contextlib.AbstractContextManager[None]:
    """The model without dropout inside the block, and its mode restored after it."""

    @contextlib.contextmanager
    def mode() -> Iterator[None]:
        was_training = model.training
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)

    return mode()


def products_in(dtype: torch.dtype | None, model: Any) -> contextlib.AbstractContextManager[Any]:
    """Matrix products of `dtype` inside the block, by torch's autocast; None = in the type of the weights."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(model.device.type, dtype)


def mixes_types(model: Any) -> bool:
    """Whether weights have several floating-point types, so that passes need autocast."""
    return len({p.dtype for p in model.parameters() if p.is_floating_point()}) > 1


def tolerance(dtype: torch.dtype) -> float:
    """How far two ways to the same hidden state may differ, relative to its largest entry."""
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 5e-2)
