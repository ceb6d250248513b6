"""The examples of TRL 1.16's documentation (GRPO and RLOO, text only) with the import, the model and the data changed.

Each runs for two steps, and transformers loads what it saved. Models and rows are made here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl_example_rewards as rewards
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from llm_pg import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from llm_pg.metrics import read_metrics
from llm_pg.rewards.scorer import Scorer

TLDR = Dataset.from_list([{"prompt": f"POST: number {i}\nTL;DR:", "completion": f" {i}"} for i in range(32)])
DEEPMATH = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": f"What is {i} + 1?"}], "solution": rf"${i + 1}$"} for i in range(32)]
)
MIXED = Dataset.from_list(
    [
        {"prompt": "What is 2+2?", "task": "math"},
        {"prompt": "Write a function that adds.", "task": "code"},
        {"prompt": "What is 3*4?", "task": "math"},
        {"prompt": "Write a function that multiplies.", "task": "code"},
    ]
)
SHORT = {"max_steps": 2, "max_completion_length": 12, "use_cpu": True}
GROUPS = {"per_device_train_batch_size": 8, "num_generations": 4, "eval_strategy": "no"}


class TwoSteps(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= 2


@pytest.fixture(scope="module")
def model_id(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model and its tokenizer in a folder, which stands for a name on the hub."""
    from llm_pg.config.schema import ModelConfig
    from llm_pg.model.loading import character_tokenizer, load_model

    folder, tokenizer = tmp_path_factory.mktemp("hub") / "tiny-instruct", character_tokenizer()
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = {"model_type": "qwen2", **size, "num_key_value_heads": 2, "max_position_embeddings": 512}
    load_model(ModelConfig(make=made), tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example names no output_dir, or a relative one."""
    monkeypatch.chdir(tmp_path)


def trained(trainer: Any) -> list[dict[str, Any]]:
    """The lines of metrics of a run of two steps whose model transformers loads, with the trainer's own logits."""
    summary = trainer.train()
    lines = read_metrics(trainer.folder.metrics)
    assert [line["step"] for line in lines] == [1, 2]
    assert summary["steps"] == 2
    loaded = AutoModelForCausalLM.from_pretrained(summary["model"])
    ids = AutoTokenizer.from_pretrained(summary["model"])("What is 1+1?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits)
    return lines


@pytest.mark.parametrize("kind", [GRPOTrainer, RLOOTrainer])
def test_the_quick_start_runs_with_trls_accuracy_reward_and_no_arguments(kind: Any, model_id: str) -> None:
    from trl.rewards import accuracy_reward

    trainer = kind(model=model_id, reward_funcs=accuracy_reward, train_dataset=DEEPMATH, callbacks=[TwoSteps()])
    lines = trained(trainer)
    assert all(line["reward/accuracy_reward"] == line["reward"] >= 0 for line in lines)
    assert all(line["unscorable"] == 0 for line in lines)


def test_trls_accuracy_reward_tells_right_from_wrong_in_our_workers() -> None:
    from trl.rewards import accuracy_reward

    answers = [r"It is \boxed{\frac{1}{3}}.", r"It is \boxed{\frac{1}{2}}.", "It is a third."]
    rows = [{"solution": r"$\frac{1}{3}$"}, {"solution": r"$\frac{1}{3}$"}, {"solution": ""}]
    with Scorer([accuracy_reward], max_unscorable=1.0) as scorer:
        completions = [[{"role": "assistant", "content": text}] for text in answers]
        assert scorer.grade(["1/3?"] * 3, completions, [[1]] * 3, rows).reward == [1.0, 0.0, None]


def test_the_readmes_reward_for_many_letters_runs(model_id: str) -> None:
    training_args = GRPOConfig(output_dir="tiny-GRPO", **SHORT, **GROUPS)
    trainer = GRPOTrainer(model=model_id, reward_funcs=rewards.unique_letters, args=training_args, train_dataset=TLDR)
    assert all(line["reward"] > 1 for line in trained(trainer))
    assert trainer.folder.path.parent == Path("tiny-GRPO")


@pytest.mark.parametrize("reward", [rewards.many_tokens, rewards.many_characters])
def test_rewards_for_length_see_the_tokens_or_the_text(reward: Callable[..., Any], model_id: str) -> None:
    trainer = GRPOTrainer(
        model=model_id, reward_funcs=reward, args=GRPOConfig(output_dir="out", **SHORT, **GROUPS), train_dataset=TLDR
    )
    for line in trained(trainer):
        if reward is rewards.many_tokens:
            assert line["reward"] == pytest.approx(line["completion_length"])
        else:
            assert 0 < line["reward"] <= line["completion_length"]


def test_a_format_reward_reads_conversational_completions(model_id: str) -> None:
    from trl.rewards import think_format_reward

    trainer = GRPOTrainer(
        model=model_id,
        reward_funcs=[rewards.thinks_then_answers, think_format_reward],
        args=GRPOConfig(output_dir="out", reward_weights=[1.0, 0.5], **SHORT, **GROUPS),
        train_dataset=DEEPMATH,
    )
    assert all(
        line["reward/thinks_then_answers"] == line["reward/think_format_reward"] == 0 for line in trained(trainer)
    )


def test_a_reward_reads_a_column_of_the_dataset(model_id: str) -> None:
    dataset = Dataset.from_list([{"prompt": f"{i}+0=", "ground_truth": str(i % 10)} for i in range(32)])
    trainer = GRPOTrainer(
        model=model_id,
        reward_funcs=rewards.begins_as_the_reference,
        args=GRPOConfig(output_dir="out", **SHORT, **GROUPS),
        train_dataset=dataset,
    )
    assert all(0 <= line["reward"] < 1 for line in trained(trainer))


def test_multi_task_rewards_that_return_none_are_told_apart(model_id: str) -> None:
    trainer = GRPOTrainer(
        model=model_id,
        reward_funcs=[rewards.of_sums, rewards.of_code],
        args=GRPOConfig(output_dir="out", **SHORT, **GROUPS),
        train_dataset=MIXED,
    )
    for line in trained(trainer):
        assert line["unscorable"] == 0
        present = [line[name] for name in ("reward/of_sums", "reward/of_code") if line[name] is not None]
        assert present
        assert all(-1 <= value <= 1 for value in present)


def test_a_dataset_of_four_rows_runs_without_arguments(model_id: str) -> None:
    trainer = GRPOTrainer(
        model=model_id,
        reward_funcs=[rewards.of_sums, rewards.of_code],
        train_dataset=MIXED,
        callbacks=[TwoSteps],
    )
    assert len(trainer.train_prompts) == trainer.context.plan.prompts == 3  # one of the four is held out
    trained(trainer)


def test_async_and_plain_functions_are_summed_with_their_weights(model_id: str) -> None:
    trainer = GRPOTrainer(
        model=model_id,
        reward_funcs=[rewards.unique_letters, rewards.answered],
        args=GRPOConfig(output_dir="out", reward_weights=[0.25, 2.0], **SHORT, **GROUPS),
        train_dataset=TLDR,
    )
    for line in trained(trainer):
        total = 0.25 * line["reward/unique_letters"] + 2.0 * line["reward/answered"]
        assert line["reward"] == pytest.approx(total)


def test_a_reward_logs_columns_and_metrics(model_id: str) -> None:
    trainer = GRPOTrainer(
        model=model_id,
        reward_funcs=rewards.with_logs,
        args=GRPOConfig(output_dir="out", log_completions=True, **SHORT, **GROUPS),
        train_dataset=TLDR,
    )
    assert all(line["log/with_digits"] == pytest.approx(line["reward"]) for line in trained(trainer))


def test_a_reward_follows_the_state_of_the_trainer(model_id: str) -> None:
    trainer = GRPOTrainer(
        model=model_id,
        reward_funcs=rewards.harder_later,
        args=GRPOConfig(output_dir="out", **SHORT, **GROUPS),
        train_dataset=TLDR,
    )
    assert [line["reward"] for line in trained(trainer)] == [0.0, 0.5]  # of two steps none, then one is done


@pytest.mark.parametrize("kind, config", [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_an_adapter_is_trained_saved_and_loaded(kind: Any, config: Any, model_id: str) -> None:
    from peft import AutoPeftModelForCausalLM, LoraConfig

    trainer = kind(
        model=model_id,
        reward_funcs=rewards.unique_letters,
        args=config(output_dir="out", beta=0.05, learning_rate=1e-2, **SHORT, **GROUPS),
        train_dataset=TLDR,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    lines = trained(trainer)
    assert lines[0]["kl"] < 1e-12 < 1e-9 < lines[1]["kl"]  # the reference is the model with the adapter off
    AutoPeftModelForCausalLM.from_pretrained(trainer.folder.model)
    assert sorted(path.name for path in trainer.folder.model.glob("*.safetensors")) == ["adapter_model.safetensors"]


PAPERS = {
    "DAPO": {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.0, "mask_truncated_completions": False},
    "Dr. GRPO": {"loss_type": "dr_grpo", "scale_rewards": False},
    "GSPO": {
        "importance_sampling_level": "sequence",
        "loss_type": "grpo",
        "beta": 0.0,
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 2,
    },
    "SAPO": {"loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05},
    "CISPO": {"loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2},
    "Lite PPO": {"scale_rewards": "batch", "loss_type": "dapo"},
    "80/20": {"top_entropy_quantile": 0.2},
    "TR-DPO": {"beta": 0.04, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.6},
    "two-sided": {"delta": 2.0, "num_iterations": 2, "off_policy_mask_threshold": 0.5},
}


@pytest.mark.parametrize("paper", PAPERS)
def test_the_settings_of_a_paper_run_as_trl_writes_them(paper: str, model_id: str) -> None:
    given = {**GROUPS, **PAPERS[paper]}
    updates = given.get("num_iterations", 1) * given.get("steps_per_generation", 1)
    trainer = GRPOTrainer(
        model=model_id,
        reward_funcs=rewards.unique_letters,
        args=GRPOConfig(output_dir="out", bf16=False, **{**SHORT, "max_steps": 2 * updates}, **given),
        train_dataset=TLDR,
    )
    assert all(line["skipped_updates"] == 0 for line in trained(trainer))


def test_the_conversion_of_epochs_trains_as_many_steps_as_trl(model_id: str, tmp_path: Path) -> None:
    """TRL computes its own number when it begins to train; a callback stops it there."""
    import trl

    class Stop(Exception):
        pass

    class Seen(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.steps = state.max_steps
            raise Stop

    given = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    given.update(num_generations=4, max_completion_length=8, use_cpu=True, seed=0, learning_rate=1e-4)
    counted = []
    for module in (trl, None):
        config, kind = (module.GRPOConfig, module.GRPOTrainer) if module else (GRPOConfig, GRPOTrainer)
        seen = Seen()
        trainer = kind(
            model=model_id,
            reward_funcs=rewards.unique_letters,
            args=config(output_dir=str(tmp_path), bf16=False, eval_strategy="no", report_to="none", **given),
            train_dataset=TLDR,
            callbacks=[seen],
        )
        with pytest.raises(Stop):
            trainer.train()
        counted.append(seen.steps)
    assert counted[0] == counted[1] == 30
