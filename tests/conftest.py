"""Small models and tokenizers shared by the tests; everything is made here, nothing is fetched."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share two cores, and the models are tiny
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from collections.abc import Callable
from typing import Any

import pytest

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": {"model_type": "llama", **TINY},
    "qwen2": {"model_type": "qwen2", **TINY, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **TINY, "head_dim": 8},
    "gemma2": {"model_type": "gemma2", **TINY, "head_dim": 8, "sliding_window": 16, "final_logit_softcapping": 5.0},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from llm_pg.model.loading import character_tokenizer

    return character_tokenizer()


@pytest.fixture
def make_model(tokenizer: Any) -> Callable[..., Any]:
    """A random tiny model of a family, in float32: make_model("qwen2", seed=0)."""

    def make(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
        from llm_pg.config.schema import ModelConfig
        from llm_pg.model.loading import load_model

        return load_model(ModelConfig(make={**FAMILIES[family], **changes}), tokenizer, seed=seed)

    return make
