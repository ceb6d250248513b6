"""Whether a server computes with the trainer's weights: the same tokens, scored here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...estimators.distributions import token_logp
from ...model.attention import core_of, eval_mode
from ..protocol import SamplingParams

NAMED = 3  # weights that an error names at most


@dataclass(frozen=True)
class Sampled:
    """One completion as a server gave it: ids of prompt and completion, and the completion's log-probabilities."""

    prompt: Sequence[int]
    ids: Sequence[int]
    logp: Sequence[float]


@torch.no_grad()
def gap(model: Any, rows: Sequence[Sampled], params: SamplingParams, weights: dict[str, Tensor] | None = None) -> float:
    """Mean |log-probability of the server - of `model`| over the tokens of the rows, in nats.

    weights: some of the model's to replace for this one look, by name; a tied head and its embedding separately.
    """
    core = core_of(model)
    device = core.get_input_embeddings().weight.device
    whole = [[*row.prompt, *row.ids] for row in rows]
    width = max(map(len, whole))
    inputs = {
        "input_ids": torch.tensor([ids + [ids[-1]] * (width - len(ids)) for ids in whole], device=device),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in whole], device=device),
        "position_ids": torch.arange(width, device=device).expand(len(whole), -1),
        "use_cache": False,
    }
    with eval_mode(model):
        if weights is None:
            logits = model(**inputs).logits
        else:
            logits = torch.func.functional_call(core, weights, (), inputs, tie_weights=False).logits
    row_M = torch.tensor([i for i, row in enumerate(rows) for _ in row.ids], device=device)
    place_M = torch.tensor([len(row.prompt) - 1 + t for row in rows for t in range(len(row.ids))], device=device)
    token_M = torch.tensor([token for row in rows for token in row.ids], device=device)
    theirs_M = torch.tensor([x for row in rows for x in row.logp], dtype=torch.float64, device=device)
    ours_M = token_logp(params.warp(logits[row_M, place_M], keep=token_M), token_M).double()
    return float((ours_M - theirs_M).abs().mean())


def suspects(
    model: Any,
    rows: Sequence[Sampled],
    params: SamplingParams,
    new: dict[str, Tensor],
    old: dict[str, Tensor],
    tolerance: float,
) -> str:
    """Which weights the server did not take over, found from what it computes: one sentence.

    Each weight in turn is put back to its value before the sync; where that alone brings the trainer to the server's
    numbers, the server still has it.

    Args:
        model: without adapters (merged), in the names of `new`. new, old: weights after and before the sync.
        tolerance: of the mean gap.
    """
    changed = [name for name in new if name in old and not torch.equal(new[name], old[name])]
    device = core_of(model).get_input_embeddings().weight.device

    def with_old(names: Sequence[str]) -> float:
        return gap(model, rows, params, {name: old[name].to(device, model.dtype) for name in names})

    if not changed:
        return "No weight differs from those that the server had before."
    if with_old(changed) <= tolerance:
        if len(changed) > 1:
            return f"It still has all {len(changed)} weights that changed: the call loaded nothing."
        return f"It still has the old {changed[0]}."
    ranked = sorted((with_old([name]), name) for name in changed)
    stale = [name for value, name in ranked if value <= tolerance]
    if stale:
        return f"It still has the old {' or '.join(stale[:NAMED])}."
    nearest = ", ".join(f"{name} ({value:.2g} nats left)" for value, name in ranked[:NAMED])
    return f"No single old weight explains it; putting one back comes nearest with {nearest}."
