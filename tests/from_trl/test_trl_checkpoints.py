"""Checkpoints as transformers' scripts find and load them; training again and for longer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.run.saving import checkpoint_files
from llm_pg.terminal import Terminal
from tests.tiny import SMALL_RUN, digits

ROWS = [{"prompt": f"{a}+{b}="} for a in range(4) for b in range(4)]
SETTINGS = {**SMALL_RUN, "max_steps": 4, "save_steps": 2, "save_total_limit": None}
MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": 8,
}


@pytest.fixture
def trainer(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def make(model: Any = None, peft_config: Any = None, **changes: Any) -> Any:
        return GRPOTrainer(
            model=model or make_model("llama"),
            reward_funcs=digits,
            args=GRPOConfig(str(tmp_path), **{**SETTINGS, **changes}),
            train_dataset=ROWS,
            processing_class=tokenizer,
            peft_config=peft_config,
            terminal=Terminal(quiet=True),
        )

    return make


def weights(made: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in made.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, MOE], ids=["llama", "tied", "experts"])
def test_the_last_checkpoint_is_found_in_the_output_dir_and_loads_as_the_model(
    changes: dict[str, Any], trainer: Callable[..., Any], make_model: Callable[..., Any], tmp_path: Path
) -> None:
    made = trainer(make_model("llama", **changes))
    made.train()
    found = get_last_checkpoint(str(tmp_path))
    assert found == str(tmp_path / "checkpoint-4")
    loaded, ids = AutoModelForCausalLM.from_pretrained(found), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, made.model.eval()(ids).logits, rtol=0, atol=1e-6)
    assert AutoTokenizer.from_pretrained(found)("1+2=")["input_ids"] == made.tokenizer("1+2=")["input_ids"]
    state = TrainerState.load_from_json(str(Path(found) / "trainer_state.json"))
    assert (state.global_step, len(state.log_history)) == (4, 4)


def test_a_checkpoint_of_an_adapter_loads_as_the_adapter(
    trainer: Callable[..., Any], make_model: Callable[..., Any], tmp_path: Path
) -> None:
    make_model("llama").save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    made = trainer(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora)
    made.train()
    loaded, ids = AutoPeftModelForCausalLM.from_pretrained(get_last_checkpoint(str(tmp_path))), torch.tensor([[5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, made.model.eval()(ids).logits)


def test_a_run_goes_on_from_what_transformers_finds_bit_for_bit(trainer: Callable[..., Any], tmp_path: Path) -> None:
    whole = trainer(run_name="whole")
    whole.train()
    second = trainer(run_name="second")
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(whole), weights(second))
    assert (tmp_path / "checkpoint-4").resolve() == (second.folder.checkpoints / "step-000004").resolve()


def test_links_to_checkpoints_that_are_dropped_go_with_them(trainer: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()  # of somebody else
    trainer(save_steps=1, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 3, 4)]
    assert not (tmp_path / "checkpoint-1").is_symlink()


def test_a_checkpoint_without_a_model_still_goes_on(trainer: Callable[..., Any]) -> None:
    """As they were written before they held one."""
    whole = trainer(run_name="whole")
    whole.train()
    first = trainer()
    first.train()
    state, identity = checkpoint_files.load(first.folder.checkpoints / "step-000002")
    old = checkpoint_files.save(first.folder.path / "old", state, identity)
    assert sorted(path.name for path in old.iterdir()) == sorted([*checkpoint_files.FILES, "manifest.json"])
    second = trainer(run_name="second")
    second.train(resume_from_checkpoint=old)
    assert same(weights(whole), weights(second))


def test_training_goes_on_to_a_larger_max_steps(trainer: Callable[..., Any]) -> None:
    whole = trainer(run_name="whole", max_steps=6)
    whole.train()
    made = trainer()
    made.train()
    made.args.max_steps = 6
    assert made.train(resume_from_checkpoint=True).global_step == 6
    assert same(weights(whole), weights(made))
    assert [entry["step"] for entry in made.state.log_history] == [1, 2, 3, 4, 5, 6, 6]


def test_training_again_goes_on_from_the_weights_in_a_folder_of_its_own(trainer: Callable[..., Any]) -> None:
    made = trainer(beta=0.1, max_steps=2)
    start = {name: p.clone() for name, p in made.ref_model.named_parameters()}
    first = made.train()
    after = weights(made)
    second = made.train()
    assert [Path(result["model"]).parent.name for result in (first, second)] == ["r", "r-2"]
    assert (second.global_step, len(made.state.log_history)) == (2, 3)
    assert all(torch.equal(start[name], p) for name, p in made.ref_model.named_parameters())
    assert not same(after, weights(made))
    saved = AutoModelForCausalLM.from_pretrained(first["model"]).state_dict()
    assert same({name: after[name] for name in saved}, saved)
    lines = (made.folder.path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["kl"] > 1e-4  # it begins where the first ended
