"""The size of a model, from its config alone: no weight is read or made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..config import ConfigError


@dataclass(frozen=True)
class Shape:
    """parameters: each once, also where two layers are tied; layers; hidden: width; kv: keys of one token and layer,
    numbers (values are as many); linear: weights in linear layers but for the output layer; ends: inputs and outputs of
    those layers, each layer's added up."""

    parameters: int
    layers: int
    hidden: int
    kv: int
    linear: int = 0
    ends: int = 0


def shape_of_model(name: str) -> Shape:
    """Returns the shape of a causal LM.

    Args:
        name: a folder with a `config.json`, or a hub id.

    Raises:
        ConfigError: there is no such config, or it is not of a causal LM with attention.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        text = config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        parameters = sum(p.numel() for p in model.parameters())
        head = model.get_output_embeddings()
        layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        linear, ends = sum(m.weight.numel() for m in layers), sum(m.in_features + m.out_features for m in layers)
        return Shape(parameters, text.num_hidden_layers, text.hidden_size, heads * width, linear, ends)
    except (OSError, ValueError, AttributeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"No model was found at {name!r} whose size could be told ({said}). Give a folder with a config.json of a "
            "causal LM, a hub id, or one of the sizes that `llm-pg plan --help` lists."
        ) from None
