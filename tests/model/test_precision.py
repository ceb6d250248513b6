"""What a model comes in and what its trained weights are held in: small steps move every one of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from llm_pg.config.schema import ModelConfig
from llm_pg.config.train import TrainConfig
from llm_pg.learner.optimizer import make_optimizer
from llm_pg.model.loading import incoming_half
from llm_pg.model.precision import half_type
from tests import tiny

SMALL = {"max_steps": 20, "learning_rate": 1e-6}


def run(model: Any, tokenizer: Any, folder: Path, peft_config: Any = None, **changes: Any) -> Any:
    trainer: Any = tiny.trainer(model, tokenizer, folder, peft_config=peft_config, **{**SMALL, **changes})
    start = {name: p.detach().float().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    moved = sum(int((after[name].detach().float() != value).sum()) for name, value in start.items())
    trainer.moved = moved / sum(value.numel() for value in start.values())
    trainer.said = trainer.context.terminal.said
    return trainer


def in_bfloat16_lora(model: Any) -> Any:
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


MADE: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "bfloat16 object": (lambda model: model.to(torch.bfloat16), None),
    "float16 object": (lambda model: model.to(torch.float16), None),
    "lora on a bfloat16 object": (
        lambda model: model.to(torch.bfloat16),
        peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"]),
    ),
    "lora made in bfloat16": (lambda model: in_bfloat16_lora(model.to(torch.bfloat16)), None),
}


@pytest.mark.parametrize("kind", MADE)
def test_twenty_steps_of_a_small_rate_move_nearly_every_trained_weight(
    kind: str, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    change, peft_config = MADE[kind]
    # Tied, as the head's gradient reaches the rows of all tokens.
    trainer = run(change(make_model("qwen2")), tokenizer, tmp_path, peft_config)
    assert trainer.moved > 0.9
    assert {p.dtype for p in trainer.policy.parameters()} == {torch.float32}
    assert trainer.config.train.bf16 == (kind != "float16 object")
    if "lora on" not in kind:  # where peft has made the adapter in float32 by itself
        assert any("trained weights are held in float32" in line for line in trainer.said)
    frozen = {p.dtype for p in trainer.model.parameters() if not p.requires_grad}
    assert frozen <= {torch.bfloat16}  # an adapter's model keeps its two bytes a weight


def test_a_config_in_bfloat16_is_held_in_float32_and_computed_in_bfloat16(
    tokenizer: Any, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    make_model("qwen2").save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    trainer = run(str(tmp_path / "saved"), None, tmp_path, dtype="bfloat16")
    assert trainer.moved > 0.9
    assert trainer.config.train.bf16


def test_bf16_that_was_set_to_false_is_left_and_frozen_layers_fit_the_trained(
    tokenizer: Any, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model("llama").to(torch.bfloat16)
    model.get_input_embeddings().requires_grad_(False)
    trainer = run(model, tokenizer, tmp_path, bf16=False)
    assert not trainer.config.train.bf16
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert trainer.moved > 0.9


def test_the_type_of_a_hub_model_is_that_of_its_config(make_model: Callable[..., Any], tmp_path: Path) -> None:
    make_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    auto = ModelConfig(model_name_or_path=str(tmp_path), dtype="auto")  # type: ignore[call-arg]
    assert incoming_half(None, auto) is torch.bfloat16
    assert incoming_half(str(tmp_path), ModelConfig(dtype="auto")) is torch.bfloat16  # type: ignore[call-arg]
    assert incoming_half(None, auto.model_copy(update={"dtype": "float32"})) is None
    assert half_type(make_model("llama")) is None


def test_an_optimiser_of_half_weights_is_refused(make_model: Callable[..., Any]) -> None:
    model = make_model("llama").to(torch.bfloat16)
    with pytest.raises(ValueError, match="would round to nothing"):
        make_optimizer(TrainConfig(), model.parameters())  # type: ignore[call-arg]
