"""A merged model is the one that was trained, for every place an adapter can stand in, or it is not kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_pg.cli import main
from llm_pg.config import ConfigError
from llm_pg.model import merging
from llm_pg.model.merging import rehearse_merge, save_merged
from tests import tiny
from tests.model.test_peft_kinds import TRAINED
from tests.seams import Steps

SMALL = {
    **{"max_steps": 2, "prompts_per_step": 4, "max_completion_length": 3, "num_eval_prompts": 4, "eval_num_samples": 0},
    **{"learning_rate": 0.05, "merge_adapter": True, "noise_steps": 0, "eval_on_start": False},
}
PLACES: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "head and layers": {"target_modules": ["lm_head", "q_proj", "down_proj"]},
    "head as a whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding as a whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both as one": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": list(range(5, 95))},
    "replicated layers": {"target_modules": ["q_proj", "up_proj"], "layer_replication": [[0, 2], [1, 2]]},
}

UNMERGED = {"BEFT"}  # learns biases, which this model has none of


@pytest.fixture
def make(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def trainer(family: str, peft_config: Any, **changes: Any) -> Any:
        sizes = {"tie_word_embeddings": True} if family == "tied" else {}
        model = make_model("llama", **sizes)
        return tiny.trainer(model, tokenizer, tmp_path, peft_config=peft_config, **{**SMALL, **changes})

    return trainer


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[5, 9, 11, 40, 7]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", ["tied", "untied"])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_read_back_computes_what_was_trained(
    place: str, family: str, make: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    trainer = make(family, peft.LoraConfig(r=4, **PLACES[place]))
    trainer.train()
    merged = AutoModelForCausalLM.from_pretrained(trainer.folder.merged)
    torch.testing.assert_close(logits(merged), logits(trainer.model), rtol=1e-4, atol=1e-5)
    with trainer.model.disable_adapter():
        assert not torch.allclose(logits(merged), logits(trainer.model), atol=1e-3)
    assert any("computes what was trained" in line for line in trainer.context.terminal.said)
    base = make_model("llama", tie_word_embeddings=family == "tied")
    adapted = peft.PeftModel.from_pretrained(base, trainer.folder.model)
    torch.testing.assert_close(logits(adapted), logits(trainer.model), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_that_makes_no_numbers_is_refused_before_the_run(make: Callable[..., Any]) -> None:
    """The padding row of a tied embedding is zeros, by whose length DoRA divides."""
    config = peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], use_dora=True)
    with pytest.raises(ConfigError, match="no finite numbers, before anything is trained"):
        make("tied", config, merge_adapter=False)
    trainer = make("untied", config)
    trainer.train()
    merged = AutoModelForCausalLM.from_pretrained(trainer.folder.merged)
    torch.testing.assert_close(logits(merged), logits(trainer.model), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_embeddings_stay_one_weight_where_the_adapter_leaves_them_equal(make: Callable[..., Any]) -> None:
    trainer = make("tied", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    trainer.train()
    settings = json.loads((trainer.folder.merged / "config.json").read_text())
    assert settings["tie_word_embeddings"] is True


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_that_are_two_views_of_one_memory_are_refused_before_the_run(make: Callable[..., Any]) -> None:
    both = peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    with pytest.raises(ConfigError, match=r"lora_.* are in the same memory .*ensure_weight_tying=True"):
        make("tied", both, merge_adapter=False)


def test_an_adapter_that_cannot_be_merged_is_refused_before_the_first_step(make: Callable[..., Any]) -> None:
    trainer = make("untied", peft.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True))
    with pytest.raises(ConfigError, match=r"trial before the first step failed\. An adapter by LoraConfig cannot be"):
        trainer.train()
    assert not trainer.folder.metrics.exists()


def unmerged(model: Any) -> Any:
    """The model without its adapter: what merging makes of one that it leaves out."""
    import copy

    return copy.deepcopy(model).unload()


def test_a_merged_model_that_computes_something_else_is_refused_before_the_first_step(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make("untied", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    monkeypatch.setattr(merging, "merged_copy", unmerged)
    with pytest.raises(ConfigError, match=r"4 prompts differ by up to \d.*where .* allowed for weights in float32"):
        trainer.train()
    assert not trainer.folder.metrics.exists()
    assert not list(trainer.folder.path.glob(".rehearsal*"))


def test_a_merged_model_that_computes_something_else_is_not_kept_and_the_adapter_is(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make("untied", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    trainer.add_callback(Steps(before=lambda _: monkeypatch.setattr(merging, "merged_copy", unmerged)))
    trainer.train()
    assert not trainer.folder.merged.exists()
    assert (trainer.folder.model / "adapter_model.safetensors").exists()
    told = [line for line in trainer.context.terminal.said if "was not written" in line]
    assert len(told) == 1
    assert "is not the one that was trained" in told[0]
    assert str(trainer.folder.model) in told[0]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_command_merges_an_adapter_on_the_head_of_a_tied_model(
    dtype: torch.dtype, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    base = make_model("llama", tie_word_embeddings=True).to(dtype)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["lm_head", "v_proj"]))
    with merging.moved(model).in_place():
        model.save_pretrained(tmp_path / "adapter")
        trained = logits(model).float()
    assert main(["merge", str(tmp_path / "adapter"), "--to", str(tmp_path / "one")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    exact = dtype is torch.float32
    torch.testing.assert_close(logits(merged).float(), trained, rtol=0, atol=1e-4 if exact else 0.02)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", TRAINED)
def test_every_kind_merges_or_is_refused_in_one_paragraph(
    kind: str, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    from llm_pg.model.adapters import wrap

    model = wrap(make_model("qwen2" if "bias" in kind else "llama"), TRAINED[kind]())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if kind in UNMERGED:
        with pytest.raises(ConfigError, match=r"^merge_adapter is true.*cannot be merged.*$"):
            rehearse_merge(model, tokenizer, tmp_path / "trial")
    else:
        rehearse_merge(model, tokenizer, tmp_path / "trial")
        save_merged(model, tokenizer, tmp_path / "merged")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
