"""An adapter in the weights of its model: merged in a copy, and saved only where that computes what was trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config, ConfigError
from .adapters import TRIED, has_adapter, moved
from .attention import core_of, eval_mode, mixes_types, products_in
from .precision import half_type

PROMPTS, LONGEST = 4, 256  # held-out prompts that are compared, and their tokens at most
# How far logits may differ, relative to the largest. In bfloat16 a merged weight is rounded where the adapter's
# product was not: measured up to 0.036 on 30 layers.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}


def check_merge(config: Config, model: Any, *, sharded: bool) -> None:
    """ConfigError where `run.merge_adapter` cannot be done at the end."""
    if not config.run.merge_adapter:
        return
    if not has_adapter(model):
        raise ConfigError("merge_adapter is true and the model has no adapter. Set use_peft=true, or leave it out.")
    if sharded or config.model.load_in_4bit:
        why = "its weights are cut over the ranks" if sharded else "its weights are held in 4 bits"
        raise ConfigError(
            f"merge_adapter is true and the model cannot be merged where it is: {why}. Leave it out, and after the run "
            "call llm-pg merge RUN, which reads the whole weights."
        )


def rehearse_merge(model: Any, tokenizer: Any, folder: Path, prompts: Sequence[Sequence[int]] = ()) -> None:
    """Tries `save_merged` with other values in the adapter, as most begin by changing nothing.

    Raises ConfigError where the merged model could not be saved at the end of the run.
    """
    try:
        with moved(model).in_place():
            save_merged(model, tokenizer, folder, prompts)
    except ConfigError as error:
        raise ConfigError(
            f"merge_adapter is true, and a trial before the first step failed. {error} Set merge_adapter=false, or "
            "choose another adapter or other target_modules."
        ) from None


@torch.no_grad()
def save_merged(model: Any, tokenizer: Any, folder: Path, prompts: Sequence[Sequence[int]] = ()) -> str:
    """Writes the model with its active adapter in its weights, reads it back and compares the logits of both.

    The model given stays as it is; a copy is merged, which needs memory for a second one. Where input and output
    embeddings share a weight and only one of them has an adapter, they are two in the merged model.

    Args:
        model: of peft. folder: as `AutoModelForCausalLM.from_pretrained` reads it; new, or to be thrown away where this
            raises.
        prompts: token ids of the rows that are compared, the first `PROMPTS` of them; none = a few fixed tokens.

    Returns:
        How far the logits differ, as a line of the log.

    Raises:
        ConfigError: the adapter cannot be merged, or the logits of what was read back differ from the trained model's
            by more than `TOLERANCE` of the weights' type, relative to the largest logit.
    """
    core = core_of(model)
    vocabulary = core.get_input_embeddings().weight.shape[0]
    rows = [list(ids[-LONGEST:]) for ids in prompts[:PROMPTS]] or [[token % vocabulary for token in TRIED]]
    kind, trained = type(model.active_peft_config).__name__, _logits(core, rows)
    try:
        merged = merged_copy(model)
        merged.save_pretrained(folder)
        del merged
        tokenizer.save_pretrained(folder)
        attention = core.config._attn_implementation
        again = type(core).from_pretrained(folder, attn_implementation=attention).to(model.device)
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"An adapter by {kind} cannot be merged into this {type(core).__name__} ({type(error).__name__}: {why}); "
            "use it as it is."
        ) from None
    pairs = list(zip(trained, _logits(again, rows), strict=True))
    gap = max(float((a - b).abs().max()) if a.shape == b.shape else float("inf") for a, b in pairs)
    dtype, largest = half_type(again) or again.dtype, max(float(a.abs().max()) for a in trained)
    allowed = TOLERANCE[dtype] * largest
    if not gap <= allowed:  # a NaN is no number that is small enough
        raise ConfigError(
            f"The merged model is not the one that was trained, and is not saved: read back, its logits on {len(rows)} "
            f"prompts differ by up to {gap:.3g}, where {allowed:.2g} is allowed for weights in "
            f"{str(dtype).removeprefix('torch.')} and logits up to {largest:.3g}. {kind} computes something that the "
            "weights of the model alone do not hold; use the adapter as it is."
        )
    return (
        f"The merged model computes what was trained: logits on {len(rows)} prompts differ by at most {gap:.2g} "
        f"({allowed:.2g} allowed)."
    )


def merged_copy(model: Any) -> Any:
    """A copy with the adapter in its weights. Each of its layers has weights of its own while that is done, else two
    adapters on one weight would both be added to it."""
    whole = copy.deepcopy(model)
    seen: set[int] = set()
    for module in whole.modules():
        for name, weight in module._parameters.items():
            if weight is not None and id(weight) in seen:
                module._parameters[name] = torch.nn.Parameter(weight.detach().clone(), weight.requires_grad)
            seen.add(id(weight))
    ties = any(getattr(config, "tie_word_embeddings", False) for config in _configs(whole))
    merged = whole.merge_and_unload()
    head = merged.get_output_embeddings()
    if ties and head is not None:
        embedding = merged.get_input_embeddings()
        same = torch.equal(embedding.weight, head.weight)
        if same:
            head.weight = embedding.weight
        for config in _configs(merged):
            config.tie_word_embeddings = same
    return merged


def _configs(model: Any) -> list[Any]:
    config = core_of(model).config
    return [config, config.get_text_config()]


def _logits(model: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    with eval_mode(model), products_in(half_type(model) if mixes_types(model) else None, model):
        ids = [torch.tensor([row], device=model.device) for row in rows]
        return [model(input_ids=row, use_cache=False).logits[0].float() for row in ids]
