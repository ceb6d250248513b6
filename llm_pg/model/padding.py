"""A training batch as a row a completion, padded on the right: for models that packed rows would not compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..device import to_device
from ..rollouts import TextRollouts
from .attention import body_of, core_of


def padded_states(
    model: Any, rollouts: TextRollouts, after_B: Tensor | None, pad_id: int, *, with_logits: bool
) -> tuple[Tensor, Tensor | None]:
    """The hidden state that predicts each completion token, (M, hidden), in row-major order of the mask; behind them
    those after the last tokens of the rows `after_B`. with_logits: also the logits of the former, by the whole model.
    """
    ids, attention, start_B = padded_rows(rollouts, pad_id)
    row_M, step_M = rollouts.on_host("mask_BT").nonzero(as_tuple=True)
    place_M = start_B[row_M] - 1 + rollouts.place_BT()[row_M, step_M]
    num_tokens = len(row_M)
    if after_B is not None:
        ends = after_B.nonzero().squeeze(1)
        row_M = torch.cat([row_M, ends])
        place_M = torch.cat([place_M, start_B[ends] - 1 + rollouts.context_length_B[ends]])
    row_M, place_M = to_device(torch.stack([row_M, place_M]), rollouts.mask_BT.device)
    # Padded on the right, positions are the model's own, which not every model counts from 0.
    inputs = {
        "input_ids": to_device(ids, rollouts.mask_BT.device),
        "attention_mask": to_device(attention, rollouts.mask_BT.device),
        "use_cache": False,
    }
    core = core_of(model)
    if not with_logits:
        hidden: Tensor = body_of(core)(**inputs).last_hidden_state
        return hidden[row_M, place_M], None
    seen: list[Tensor] = []
    hook = body_of(core).register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state))
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        hook.remove()
    return seen[0][row_M, place_M], logits[row_M[:num_tokens], place_M[:num_tokens]]


def padded_rows(rollouts: TextRollouts, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of prompt then what follows it, right-padded: ids and attention mask, int64 (B, width), and the lengths of
    the prompts, int64 (B,), on the host."""
    start_B = torch.tensor([len(p) for p in rollouts.prompt_ids_B])
    end_B = start_B + rollouts.context_length_B
    width = int(end_B.max())
    ids = torch.full((len(start_B), width), pad_id, dtype=torch.int64)
    column = torch.arange(width)
    flat_prompts = torch.tensor([i for p in rollouts.prompt_ids_B for i in p], dtype=torch.int64)
    ids[column < start_B.unsqueeze(1)] = flat_prompts
    inside = (column >= start_B.unsqueeze(1)) & (column < end_B.unsqueeze(1))
    if rollouts.inserted_B is None:
        ids[inside] = rollouts.on_host("tokens_BT")[rollouts.on_host("mask_BT")]
    else:
        ids[inside] = torch.tensor([i for row in rollouts.context_ids() for i in row])
    return ids, (column < end_B.unsqueeze(1)).long(), start_B
