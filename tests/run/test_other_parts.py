"""Of a checkpoint of text and images the text is trained, and that is said before the first step and at the save."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from llm_pg.config import ConfigError
from llm_pg.metrics import read_metrics
from llm_pg.model.loading import context_length
from tests import tiny

TEXT = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1},
}
VISION = {"hidden_size": 16, "intermediate_size": 32}
KINDS: dict[str, dict[str, Any]] = {
    "gemma3": {
        **{"text_config": {**TEXT, "sliding_window": 16}, "image_token_index": 5, "boi_token_index": 6},
        **{"vision_config": {**VISION, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}},
        **{"eoi_token_index": 7, "num_hidden_layers": 1},
    },
    "qwen3_5": {
        "text_config": {**TEXT, "layer_types": ["full_attention"] * 2},
        "vision_config": {**VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "patch_size": 8},
    },
}


@pytest.fixture
def checkpoint(tokenizer: Any, tmp_path: Path) -> Callable[[str], Path]:
    """A folder with a tiny model of text and images."""

    def make(kind: str) -> Path:
        text = {**KINDS[kind]["text_config"], "vocab_size": len(tokenizer)}
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.for_model(kind, **{**KINDS[kind], "text_config": text})
        )
        model.save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


def trained(model: Any, tokenizer: Any, folder: Path, **changes: Any) -> Any:
    trainer: Any = tiny.trainer(model, tokenizer, folder, **changes)
    trainer.before = list(trainer.context.terminal.warned)
    trainer.train()
    trainer.after = trainer.context.terminal.warned[len(trainer.before) :]
    return trainer


@pytest.mark.parametrize("given", ["folder", "object", "adapter"])
def test_a_text_part_that_was_loaded_alone_is_said_before_and_at_the_save(
    given: str, checkpoint: Callable[[str], Path], tokenizer: Any, tmp_path: Path
) -> None:
    folder = checkpoint("qwen3_5")
    model: Any = folder if given == "folder" else AutoModelForCausalLM.from_pretrained(folder)
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"]) if given == "adapter" else None
    trainer = trained(model, tokenizer, tmp_path, peft_config=adapter)
    (before,) = [line for line in trainer.before if "parts for text and vision" in line]
    assert "that for text alone (Qwen3_5ForCausalLM) is loaded, trained and saved" in before
    (after,) = [line for line in trainer.after if "vision" in line]
    assert after == f"{trainer.folder.model} holds the text part of {folder} alone: no vision."


def test_a_model_that_holds_both_keeps_the_other_part_as_it_came(
    checkpoint: Callable[[str], Path], tokenizer: Any, tmp_path: Path
) -> None:
    folder = checkpoint("gemma3")
    trainer = trained(folder, tokenizer, tmp_path)
    (before,) = [line for line in trainer.before if "vision" in line]
    assert "Gemma3ForConditionalGeneration has parts for text and vision: that for text is trained" in before
    (after,) = [line for line in trainer.after if "vision" in line]
    assert "vision is as it came" in after
    start, saved = (AutoModelForImageTextToText.from_pretrained(f) for f in (folder, trainer.folder.model))
    moved = {name for (name, a), b in zip(start.named_parameters(), saved.parameters(), strict=True) if (a != b).any()}
    assert moved
    assert not any("vision" in name or "multi_modal" in name for name in moved)
    assert all(line["sampler_gap"] < 1e-5 for line in read_metrics(trainer.folder.metrics))


@pytest.mark.parametrize("kind", ["llama", "a saved llama"])
def test_nothing_is_said_of_a_model_of_text(
    kind: str, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    model: Any = make_model("llama")
    if kind == "a saved llama":
        model.save_pretrained(tmp_path / "m")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    trainer = trained(model, tokenizer, tmp_path)
    assert not any("text" in line for line in (*trainer.before, *trainer.after))


def test_the_context_is_that_of_the_text_part(
    checkpoint: Callable[[str], Path], tokenizer: Any, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("gemma3"))
    assert context_length(model) == 64
    with pytest.raises(ConfigError, match="context of 64 tokens"):
        trained(model, tokenizer, tmp_path, max_completion_length=64)
