"""Adapters (peft): what is added to a model, what is refused, weights in 4 bits, and the merged model.

With an adapter the reference of the KL is the same weights with the adapter off, so no second model stands in memory.
A model that comes with a trained adapter is compared with that adapter as it came: a copy of its weights is kept.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config, ConfigError
from ..config.schema import ModelConfig

# Kinds of peft that do more than replace layers: their wrapper changes the inputs or must be called at every step.
_BEYOND_LAYERS = {
    "ADALORA": "moves its ranks by calls of its own at every step",
    "ADAPTION_PROMPT": "puts learned prompts into attention",
    "POLY": "needs a task number with every input",
    "XLORA": "mixes adapters by a pass of its own before each pass",
}


def has_adapter(model: Any) -> bool:
    return hasattr(model, "disable_adapter")


def lora_config(config: ModelConfig) -> Any:
    """The peft config that the settings describe. Imports peft."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules or "all-linear",
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        task_type="CAUSAL_LM",
    )


def wrap(model: Any, peft_config: Any) -> Any:
    """The model with a new adapter of any kind of peft that lives in the model's layers.

    Raises ConfigError for other kinds, for what is no peft config, and for a model that has an adapter already.
    """
    from peft import PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(
            f"peft_config must be a config of peft, such as LoraConfig(r=16); got {type(peft_config).__name__}."
        )
    if has_adapter(model):
        raise ConfigError(
            "The model has an adapter already, and a peft_config (or model.use_peft) asks for a new one. Train the "
            "adapter that is there (leave peft_config out), or give model.merge_and_unload(), which has it in its "
            "weights."
        )
    _check_kind(peft_config)
    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:
        raise ConfigError(f"peft cannot add {type(peft_config).__name__} to this model: {error}") from None


def _check_kind(peft_config: Any) -> None:
    kind = str(getattr(peft_config.peft_type, "value", peft_config.peft_type))
    why = _BEYOND_LAYERS.get(kind)
    if peft_config.is_prompt_learning:
        why = "puts learned tokens before the prompt"
    if getattr(peft_config, "alora_invocation_tokens", None):
        why = "switches itself on at certain tokens"
    if why:
        raise ConfigError(
            f"{type(peft_config).__name__} {why}; here passes are packed and call the model's layers, so that it would "
            "be left out. Use one that replaces layers: LoraConfig (also use_dora, use_rslora), LoHaConfig, "
            "LoKrConfig, IA3Config, OFTConfig, VeraConfig, ..."
        )


def check_trainable(model: Any) -> None:
    """ConfigError where nothing of the model is trained, as with an adapter loaded for use alone."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            "No weight of the model has requires_grad, so there is nothing to train. An adapter of your own is loaded "
            "for training by PeftModel.from_pretrained(model, folder, is_trainable=True)."
        )


def in_four_bits(config: ModelConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` that hold the frozen weights in 4 bits (QLoRA: NF4, doubly quantised, computed in
    bfloat16). Source: Dettmers et al. 2023, arXiv 2305.14314.

    Raises ConfigError where it cannot work here.
    """
    if not config.load_in_4bit:
        return {}
    if not config.use_peft:
        raise ConfigError(
            "load_in_4bit is true and use_peft is false: weights in 4 bits cannot be trained, only an adapter on them. "
            "Set use_peft=true."
        )
    if config.make is not None:
        raise ConfigError("load_in_4bit is for saved models (model_name_or_path); a made one has no weights to read.")
    if not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None:
        missing = "a CUDA device" if not torch.cuda.is_available() else "the package bitsandbytes (pip install it)"
        raise ConfigError(
            f"load_in_4bit needs {missing}, which is not here. Train an adapter on weights in bfloat16: "
            "load_in_4bit=false dtype=bfloat16, about four times the memory for the frozen weights."
        )
    from transformers import BitsAndBytesConfig

    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": four, "device_map": {"": torch.cuda.current_device()}}


class StartingAdapter:
    """The adapter in training as it was when this was made: what it is compared with. The copy is all it takes."""

    def __init__(self, model: Any) -> None:
        own = [p for p in model.parameters() if p.requires_grad]
        self.pairs: list[tuple[torch.nn.Parameter, Tensor]] = [(p, p.detach().clone()) for p in own]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with its starting adapter inside the block; no gradient may be taken there."""
        present = [p.data for p, _ in self.pairs]
        try:
            for parameter, start in self.pairs:
                parameter.data = start
            yield
        finally:
            for (parameter, _), value in zip(self.pairs, present, strict=True):
                parameter.data = value


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


def save_merged(model: Any, tokenizer: Any, folder: Path) -> None:
    """The model with its active adapter in its weights, as `AutoModelForCausalLM.from_pretrained` reads it.

    The model given stays as it is; a copy is merged, which needs memory for a second one.
    """
    try:
        merged = copy.deepcopy(model).merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError) as error:
        kind = type(model.active_peft_config).__name__
        raise ConfigError(f"An adapter by {kind} cannot be merged into its model ({error}); use it as it is.") from None
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
