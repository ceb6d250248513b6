"""Models and prompts that the tests of a real vLLM share."""

from typing import Any

import torch

from llm_pg.sampling.vllm.compare import Sampled

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "untied": {"model_type": "llama", **SHAPE, "num_key_value_heads": 2, "max_position_embeddings": 128},
    "tied": {
        **{"model_type": "qwen2", **SHAPE, "num_key_value_heads": 2, "max_position_embeddings": 128},
        "tie_word_embeddings": True,
    },
}
# Longer than a block of the prefix cache, so that a stale prefix would show.
PROMPTS = [list(range(5, 5 + n)) for n in (40, 33, 20, 6)]
G = 4
EXACT = 1e-5  # mean |Δ log-probability| in float32


def rows_of(done: Any) -> list[Sampled]:
    return [
        Sampled(PROMPTS[i // G], tokens[mask].tolist(), logp[mask].tolist())
        for i, (tokens, mask, logp) in enumerate(zip(done.tokens_BT, done.mask_BT, done.logp_BT, strict=True))
    ]


def move(model: Any) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * p.std().nan_to_num(0.0) * torch.randn_like(p))
