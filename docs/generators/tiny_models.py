"""A tiny random model of every causal architecture that transformers has, made from its config class."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

VOCABULARY = 101
# The sizes of a config that has them. What counts layers is 2, or as many as show every kind of layer.
SMALL = json.loads("""{
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "attention_hidden_size": 32, "embedding_size": 32,
    "intermediate_size": 64, "ffn_dim": 64, "n_inner": 64, "ffn_hidden_size": 64, "moe_intermediate_size": 32,
    "shared_intermediate_size": 32, "shared_expert_intermediate_size": 32, "shared_experts_intermediate_size": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "rotary_dim": 8,
    "kv_lora_rank": 16, "q_lora_rank": 16, "query_pre_attn_scalar": 8,
    "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "max_seq_len": 256, "sliding_window": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "n_group": 1, "topk_group": 1, "num_expert_group": 1, "first_k_dense_replace": 1,
    "index_head_dim": 8, "index_n_heads": 2, "index_topk": 64,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_head_dim": 8, "linear_num_heads": 4,
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 16, "mamba_n_groups": 1,
    "mamba_dt_rank": 4, "state_size": 8, "time_step_rank": 4, "chunk_size": 16, "n_groups": 1,
    "hidden_size_per_layer_input": 8
}""")
HYBRID = ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"]
LOCAL_AND_GLOBAL = ["sliding_attention"] * 4 + ["full_attention"]
# What a family needs beside them, by the model_type of its text.
OTHERS: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "deepseek_v4": {"mlp_layer_types": None},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 10,
        "num_kv_shared_layers": 5,
        "layer_types": LOCAL_AND_GLOBAL * 2,
        "activation_sparsity_pattern": None,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "granitemoehybrid": {"num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"num_hidden_layers": 8},
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "minimax": {"block_size": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 4},
    "phi3": {"original_max_position_embeddings": 256},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 200,
        "split_ngram_parts": 4,
        "ple_embed_dim": 32,
        "heads_per_ngram": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 16, "lru_width": 32},
    "rwkv": {"context_length": 256},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": HYBRID,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 5,
        "layers_block_type": HYBRID,
        "attention_hidden_size": 64,
        "intermediate_size": 64,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
# Architectures that this page leaves out, and why.
LEFT_OUT = {
    "bert-generation": "is the half of an encoder-decoder",
    "blt": "reads bytes in patches that a second model cuts",
    "cohere_compass_text": "its config class makes no model by its own defaults",
    "cpmant": "counts a task's prompt tokens among the positions",
    "emu3": "has no class for its text alone",
    "gemma4_assistant": "drafts for another model, whose states it reads",
    "gemma4_unified_assistant": "drafts for another model, whose states it reads",
    "git": "captions pictures",
    "mllama": "has no class for its text alone",
    "moshi": "writes speech beside text",
    "musicgen": "writes music",
    "musicgen_melody": "writes music",
    "phi4_multimodal": "its class holds the parts for pictures and sound, which cannot be made small",
    "trocr": "reads pictures of text",
    "whisper": "reads speech",
    "xlm": "is an encoder unless its config says otherwise",
    "xlnet": "sees the tokens behind a place as well",
}


def architectures() -> dict[str, list[str]]:
    """The class of each causal language model, and the model_types that it is for.

    Encoders and encoder-decoders that have a causal class too are left out, and so is `LEFT_OUT`.
    """
    others = set(MODEL_FOR_MASKED_LM_MAPPING_NAMES) | set(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES) | set(LEFT_OUT)
    found: dict[str, list[str]] = {}
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if model_type not in others:
            text = _text_config(model_type)
            known = type(text).model_type
            found.setdefault(name if known == model_type else _class_of(known, name), []).append(model_type)
    return found


def _class_of(text_type: str, name: str) -> str:
    """The class that the text alone of a checkpoint of several parts is loaded as."""
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text_type, name))


def _text_config(model_type: str) -> Any:
    return CONFIG_MAPPING[model_type]().get_text_config()


def make(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A model of random weights in float32, in eval mode; of a checkpoint of several parts that for text.

    changes: of its config.
    """
    text = _text_config(model_type)
    sizes = {**_sizes(text.to_dict()), **OTHERS.get(text.model_type, {}), **changes}
    config = type(text)(**sizes, pad_token_id=0, eos_token_id=1, bos_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _sizes(given: dict[str, Any]) -> dict[str, Any]:
    sizes = {name: size for name, size in SMALL.items() if given.get(name) is not None}
    sizes |= {name: VOCABULARY for name in ("vocab_size", "vocab_size_per_layer_input") if name in given}
    for name in ("layer_types", "layers_block_type"):
        kinds = given.get(name)
        if isinstance(kinds, list) and len(set(kinds)) > 1:
            num_layers = max(kinds.index(kind) for kind in set(kinds)) + 1
            sizes |= {name: kinds[:num_layers], "num_hidden_layers": num_layers}
    if "kv_lora_rank" in sizes and "num_key_value_heads" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if given.get("mlp_layer_types"):
        sizes["mlp_layer_types"] = ["dense", *["sparse"] * (sizes["num_hidden_layers"] - 1)]
    return sizes
