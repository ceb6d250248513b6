"""Adapters of peft in a run: what is trained, what it is compared with, what is held, saved, merged and resumed."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_pg import PolicyGradientTrainer
from llm_pg.cli import main
from llm_pg.config import ConfigError, load_config
from llm_pg.config.schema import ModelConfig
from llm_pg.metrics import read_metrics
from llm_pg.model.adapters import in_four_bits
from llm_pg.run.saving.best import load_weights
from llm_pg.sampling.vllm.weights import tensors
from llm_pg.terminal import Terminal
from tests import tiny
from tests.seams import Steps, raising

SMALL = {
    **{"max_steps": 2, "prompts_per_step": 4, "num_generations": 4, "max_completion_length": 3, "beta": 0.05},
    **{"num_eval_prompts": 4, "eval_num_samples": 0, "learning_rate": 1e-2, "use_cpu": True, "run_name": "r"},
    **{"reward_in_process": True, "engine": "native"},
}
KINDS = {
    "lora": peft.LoraConfig(r=4, target_modules="all-linear"),
    "dora": peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True),
    "rslora with trained embeddings": peft.LoraConfig(
        r=4, target_modules=["q_proj"], use_rslora=True, modules_to_save=["embed_tokens"]
    ),
    "loha": peft.LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "lokr": peft.LoKrConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "v_proj"]),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "layer norms": peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]),
}


def letters(completion: str, **row: Any) -> float:
    return sum(c.isalpha() for c in completion) / 3


@pytest.fixture
def make(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def trainer(peft_config: Any = None, model: Any = None, **changes: Any) -> Any:
        model = make_model("llama") if model is None else model
        return tiny.trainer(model, tokenizer, tmp_path, letters, peft_config=peft_config, **{**SMALL, **changes})

    return trainer


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[5, 9, 11, 40, 7]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_trains_its_own_weights_and_its_reference_is_the_model_without(
    kind: str, make: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    trainer = make(KINDS[kind])
    before, trained = state(trainer.model), {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = state(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert moved <= trained
    assert not torch.equal(logits(trainer.model), logits(make_model("llama")))
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), logits(make_model("llama")))
    assert trainer.policy.reference is None
    lines = read_metrics(trainer.folder.metrics)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(line["sampler_gap"] < 1e-5 for line in lines)
    loaded = peft.PeftModel.from_pretrained(make_model("llama"), trainer.folder.model)
    assert torch.equal(logits(loaded), logits(trainer.model))


@pytest.mark.parametrize(
    "given, message",
    [
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "learned tokens before the prompt"),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "learned tokens before the prompt"),
        (peft.AdaLoraConfig(total_step=4, target_modules=["q_proj"]), "by calls of its own at every step"),
        (peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5]), "at certain tokens"),
        (peft.LoraConfig(target_modules=["no_such_layer"]), "peft cannot add LoraConfig"),
        ({"r": 4}, "must be a config of peft"),
    ],
)
def test_an_adapter_that_a_pass_would_leave_out_is_refused(given: Any, message: str, make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        make(given)


def test_a_second_adapter_on_a_model_that_has_one_is_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="has an adapter already"):
        make(KINDS["lora"], model=make(KINDS["lora"]).model)


def test_a_model_without_anything_to_train_is_refused(make: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make(KINDS["lora"])
    trainer.save_model(tmp_path / "adapter")
    base = trainer.model.unload()
    with pytest.raises(ConfigError, match="is_trainable=True"):
        make(model=peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))


def several(make_model: Callable[..., Any], active: str) -> Any:
    """A model with two adapters of random weights."""
    model = peft.get_peft_model(make_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj", "o_proj"]))
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = 0.1 * torch.randn(value.shape, generator=generator)
    model.set_adapter(active)
    return model


@pytest.mark.parametrize("active", ["default", "other"])
def test_of_several_adapters_the_active_one_is_trained_and_all_are_saved(
    active: str, make: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    trainer = make(model=several(make_model, active))
    before = state(trainer.model)
    trainer.train()
    after = state(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(f".{active}." in name for name in moved)
    folder = trainer.folder.model
    loaded = peft.PeftModel.from_pretrained(make_model("llama"), folder)
    loaded.load_adapter(folder / "other", "other")
    assert trainer.model.active_adapters == [active]
    for name in ("default", "other"):
        loaded.set_adapter(name)
        trainer.model.set_adapter(name)
        assert torch.equal(logits(loaded), logits(trainer.model))


def test_an_adapter_that_was_trained_before_is_compared_with_itself_as_it_came(
    make: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    trainer = make(model=several(make_model, "default"), learning_rate=0.05)
    with trainer.model.disable_adapter():
        bare = logits(trainer.model)
    start = logits(trainer.model)
    assert not torch.allclose(start, bare, atol=1e-3)
    trainer.train()
    lines = read_metrics(trainer.folder.metrics)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert lines[1]["kl"] > 1e-4
    trained = logits(trainer.model)
    with trainer.policy.start.in_place():
        assert torch.equal(logits(trainer.model), start)
    assert torch.equal(logits(trainer.model), trained)


def held_bytes(*models: Any) -> int:
    """Of the distinct storages of all parameters and buffers."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for model in models
        if model is not None
        for t in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def test_with_an_adapter_no_second_model_stands_in_memory(
    make: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    model = held_bytes(make_model("llama"))
    held = {}
    for name, config in (("full", None), ("lora", KINDS["lora"])):
        trainer = make(config, run_name=name)
        trainer.train()
        held[name] = held_bytes(trainer.model, trainer.policy.reference)
        adapter = sum(p.numel() * p.element_size() for n, p in trainer.model.named_parameters() if "lora_" in n)
        moments = sum(t.nbytes for s in trainer.optimizer.state.values() for t in s.values() if t.dim())
        weights = sum(p.nbytes for p in trainer.policy.parameters())
        assert moments == 2 * weights
    assert held["full"] == 2 * model
    assert held["lora"] == model + adapter
    assert weights == adapter


@pytest.mark.parametrize("kind", ["lora", "dora", "loha"])
def test_the_merged_model_computes_what_the_adapter_does(kind: str, make: Callable[..., Any]) -> None:
    trainer = make(KINDS[kind], merge_adapter=True, learning_rate=0.05)
    trainer.train()
    merged = AutoModelForCausalLM.from_pretrained(trainer.folder.merged)
    torch.testing.assert_close(logits(merged), logits(trainer.model), rtol=1e-4, atol=1e-5)
    with trainer.model.disable_adapter():
        assert not torch.allclose(logits(merged), logits(trainer.model), atol=1e-3)
    assert (trainer.folder.model / "adapter_model.safetensors").exists()


def test_merging_is_refused_where_it_cannot_be_done(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="has no adapter"):
        make(merge_adapter=True)


def test_merge_from_the_files_gives_the_weights_that_the_run_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    changes = {
        **{"model.make": {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 64, **sizes}},
        **{"data.task": "sort_letters", "num_train_prompts": 16, "output_dir": str(tmp_path), "use_peft": True},
        **{"lora_r": 2, "use_dora": True, "merge_adapter": True, "seed": 3, "name": "grpo", **SMALL},
    }
    config = load_config(None, [f"{key}={json.dumps(value)}" for key, value in changes.items()])
    trainer = PolicyGradientTrainer(args=config, terminal=Terminal(quiet=True))
    trainer.train()
    assert main(["merge", str(trainer.folder.path), "--to", str(tmp_path / "again")]) == 0
    assert str(tmp_path / "again") in capsys.readouterr().out
    own, again = (AutoModelForCausalLM.from_pretrained(f) for f in (trainer.folder.merged, tmp_path / "again"))
    for (name, a), b in zip(own.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_merge_of_a_folder_without_an_adapter_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(tmp_path)]) == 2
    assert "no adapter_config.json" in capsys.readouterr().err


@pytest.mark.faults
@pytest.mark.parametrize("given", ["dora", "its own", "warm start"])
def test_a_run_with_an_adapter_that_was_cut_goes_on_bit_for_bit(
    given: str,
    make: Callable[..., Any],
    make_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Killed after step 3 of 4 with a checkpoint at step 2; the second starts from an adapter of its own, the third
    from one that supervised steps have moved."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}+1=", "completion": str(n + 1)}) + "\n" for n in range(8)))
    warm = {"warm_start_steps": 2, "warm_start_data_files": str(rows)} if given == "warm start" else {}

    def run(name: str, resume: bool = False, dies_at: int = 0) -> Any:
        model = several(make_model, "other") if given == "its own" else None
        kind = None if model else KINDS["lora" if warm else given]
        trainer = make(kind, model=model, run_name=name, max_steps=4, save_steps=2, **warm)
        trainer.add_callback(Steps(after=raising(KeyboardInterrupt, dies_at)))
        trainer.train(resume=resume)
        return trainer

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", dies_at=3)
    resumed = run("cut", resume=True)
    kl = [[line["kl"] for line in read_metrics(trainer.folder.metrics)] for trainer in (whole, resumed)]
    assert kl[0] == kl[1]
    assert kl[0][0] == pytest.approx(0, abs=1e-6)
    assert (whole.policy.start is None) == (given == "dora")
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_peft": False}, "cannot be trained, only an adapter"),
        ({"use_peft": True, "make": {"model_type": "llama"}, "model_name_or_path": None}, "for saved models"),
        ({"use_peft": True}, "needs the package bitsandbytes"),
    ],
)
def test_four_bits_are_refused_where_they_cannot_be_held(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        in_four_bits(ModelConfig(**{"model_name_or_path": "some/model", "load_in_4bit": True, **changes}))


def test_the_settings_make_the_adapter_they_name(make: Callable[..., Any]) -> None:
    config = make(use_peft=True, lora_r=3, use_dora=True, use_rslora=True).model.peft_config["default"]
    assert (config.r, config.use_dora, config.use_rslora) == (3, True, True)


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora with trained embeddings", "loha", "layer norms"])
def test_a_server_gets_the_weights_of_the_merged_model(kind: str, make: Callable[..., Any]) -> None:
    trainer = make(KINDS[kind], learning_rate=0.05)
    trainer.train()
    sent, merged = (tensors(m, torch.float32) for m in (trainer.model, copy.deepcopy(trainer.model).merge_and_unload()))
    assert sent.keys() == merged.keys()
    for name, value in merged.items():
        torch.testing.assert_close(sent[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("active", ["default", "other"])
def test_saved_adapters_come_back_into_a_model_with_several(
    active: str, make: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    trainer = make(model=several(make_model, active))
    trainer.train()
    fresh = several(make_model, active)
    assert not torch.equal(logits(fresh), logits(trainer.model))
    load_weights(fresh, trainer.folder.model)
    assert torch.equal(logits(fresh), logits(trainer.model))
