"""Logits of models that make more of their last hidden states than the product of the output layer.

They cap or scale logits, or have another layer before the output layer. Their own forward says what they do: it is run
with hidden states in the place of its body, so that logits are computed only where they are read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import FAULTS, body_of, core_of, eval_mode, tolerance
from .head import head_width


class OwnHead:
    """Hidden states (M, hidden) to logits (M, V) by the forward of `model` without its body."""

    def __init__(self, model: Any) -> None:
        self.core = core_of(model)
        body = body_of(self.core)
        self.name = next(name for name, module in self.core.named_children() if module is body)
        self.out_features = head_width(self.core.get_output_embeddings())

    def __call__(self, hidden_M: Tensor) -> Tensor:
        modules, ids = self.core._modules, torch.zeros((1, len(hidden_M)), dtype=torch.int64, device=hidden_M.device)
        body = modules[self.name]
        modules[self.name] = _GivenBody(body, hidden_M.unsqueeze(0))
        try:
            logits: Tensor = self.core.forward(input_ids=ids, use_cache=False).logits[0]
        finally:
            modules[self.name] = body
        return logits


class _GivenBody:
    """In the place of a body: its output is given."""

    def __init__(self, body: Any, hidden: Tensor) -> None:
        self._body, self._hidden = body, hidden

    def __call__(self, *_: Any, **__: Any) -> _GivenStates:
        return _GivenStates(self._hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


class _GivenStates:
    """What a body returns, of which nothing is there but the hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: int) -> Tensor:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@torch.no_grad()
def has_own_head(model: Any) -> bool:
    """Whether the logits of the model follow from its last hidden states alone, tried on three tokens."""
    core = core_of(model)
    body, head = body_of(core), core.get_output_embeddings()
    if head is None or body is core:
        return False
    ids = torch.arange(3, 6, device=head.weight.device).unsqueeze(0)
    try:
        with eval_mode(model):
            whole = model(input_ids=ids, use_cache=False).logits[0]
            states = body(input_ids=ids, use_cache=False).last_hidden_state[0]
            split = OwnHead(model)(states.flip(0)).flip(0)  # in another order: no token looks at its neighbours
    except torch.OutOfMemoryError:
        raise
    except (StopIteration, *FAULTS):
        return False
    bound = tolerance(whole.dtype) * whole.float().abs().max()
    return split.shape == whole.shape and bool((split.float() - whole.float()).abs().max() <= bound)
