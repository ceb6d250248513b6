"""Reward models as TRL takes them: the same texts, the same scores, the same names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from transformers import LlamaConfig, LlamaForSequenceClassification

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.config import ConfigError
from llm_pg.metrics import read_metrics
from llm_pg.rewards import Scorer
from llm_pg.rewards.models import ModelReward
from llm_pg.rewards.specs import resolve, with_processing_classes
from llm_pg.terminal import Terminal

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
PROMPTS = ["1+2=", "7+7=", "8*8 is ", "9-"]
COMPLETIONS = ["3", "14 or so, I would say", "", "64!"]
ROWS = [{"prompt": f"{a}+{b}="} for a in range(5) for b in range(5)]


def reward_model(tokenizer: Any, num_labels: int = 1, **changes: Any) -> Any:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=num_labels, pad_token_id=None, **sizes, **changes)
    return LlamaForSequenceClassification(config)


@pytest.fixture
def folder(tokenizer: Any, tmp_path: Path) -> Path:
    path = tmp_path / "judge-of-sums"
    reward_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def conversation(prompts: list[str], completions: list[str]) -> tuple[list[Any], list[Any]]:
    return (
        [[{"role": "user", "content": text}] for text in prompts],
        [[{"role": "assistant", "content": text}] for text in completions],
    )


def theirs(folder: Path, tokenizer: Any, prompts: list[Any], completions: list[Any], out: Path, policy: Any) -> Any:
    """The scores that TRL's trainer computes."""
    config = trl.GRPOConfig(
        str(out), report_to=[], use_cpu=True, bf16=False, per_device_train_batch_size=4, num_generations=4
    )
    rows = datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    trainer = trl.GRPOTrainer(
        policy, str(folder), config, rows, processing_class=tokenizer, reward_processing_classes=tokenizer
    )
    ids = [[0]] * len(prompts)
    scores = trainer._calculate_rewards([{"prompt": p} for p in prompts], prompts, completions, ids)
    return scores[:, 0].tolist(), trainer.reward_func_names


@pytest.mark.parametrize("conversational", [False, True])
def test_scores_are_those_of_trl(
    conversational: bool, folder: Path, tokenizer: Any, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    before, tokenizer.chat_template = tokenizer.chat_template, CHAT
    tokenizer.save_pretrained(folder)
    prompts, completions = conversation(PROMPTS, COMPLETIONS) if conversational else (PROMPTS, COMPLETIONS)
    try:
        expected, names = theirs(folder, tokenizer, prompts, completions, tmp_path / "trl", make_model("llama"))
    finally:
        tokenizer.chat_template = before
    with Scorer([str(folder)]) as scorer:
        scores = scorer.grade(prompts, completions, [[0]] * 4, [{}] * 4)
    assert scores.reward == pytest.approx(expected, abs=1e-6)
    assert len(set(expected)) == 4
    assert [function.name for function in scorer.functions] == names == ["judge-of-sums"]


def test_a_score_does_not_depend_on_the_texts_beside_it_nor_on_the_size_of_a_pass(folder: Path) -> None:
    model = ModelReward(str(folder))
    whole = model(PROMPTS, COMPLETIONS)
    assert model(PROMPTS, COMPLETIONS, batch_size=1) == pytest.approx(whole, abs=1e-6)
    spec = {"function": str(folder), "batch_size": 3}
    with Scorer([spec]) as scorer:
        assert scorer.grade(PROMPTS, COMPLETIONS, [[0]] * 4, [{}] * 4).reward == pytest.approx(whole, abs=1e-6)


def test_a_module_and_its_folder_give_the_same_scores_and_its_tokenizer_may_be_given(
    folder: Path, tokenizer: Any
) -> None:
    given = with_processing_classes([reward_model(tokenizer), "exact_match"], [tokenizer, None])
    with Scorer([given[0]]) as scorer:
        scores = scorer.grade(PROMPTS, COMPLETIONS, [[0]] * 4, [{}] * 4)
    assert scores.reward == pytest.approx(ModelReward(str(folder))(PROMPTS, COMPLETIONS), abs=1e-6)
    assert given[1] == "exact_match"


def test_a_trainer_takes_a_reward_model_beside_a_function(
    folder: Path, tokenizer: Any, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    def brief(completions: list[str], **_: Any) -> list[float]:
        return [-float(len(text)) for text in completions]

    settings = {"run_name": "r", "max_steps": 2, "prompts_per_step": 2, "num_generations": 4, "use_cpu": True}
    trainer = GRPOTrainer(
        make_model("llama"),
        [reward_model(tokenizer), brief],
        GRPOConfig(str(tmp_path), **settings, max_completion_length=4, num_eval_prompts=4, reward_weights=[1.0, 0.0]),
        ROWS,
        processing_class=tokenizer,
        reward_processing_classes=[tokenizer, None],
        terminal=Terminal(quiet=True),
    )
    summary = trainer.train()
    lines = read_metrics(tmp_path / "r" / "metrics.jsonl")
    assert [line["reward"] for line in lines] == [
        pytest.approx(line["reward/LlamaForSequenceClassification"]) for line in lines
    ]
    assert summary["reward_after"][0] != 0.0


@pytest.mark.faults
def test_what_is_no_reward_model_is_refused_by_name(
    folder: Path, tokenizer: Any, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    make_model("llama").save_pretrained(tmp_path / "causal")
    with pytest.raises(ValueError, match="it holds a LlamaForCausalLM"):
        resolve(str(tmp_path / "causal"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"there is no config\.json"):
        resolve(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="3 outputs"):
        ModelReward(reward_model(tokenizer, num_labels=3), tokenizer).place("cpu")
    three = tmp_path / "three"
    reward_model(tokenizer, num_labels=3).save_pretrained(three)
    tokenizer.save_pretrained(three)
    with pytest.raises(ValueError, match=r"three' (is no reward model|cannot be loaded)"):
        ModelReward(str(three)).place("cpu")
    with pytest.raises(ValueError, match="2 entries and reward_funcs 1"):
        with_processing_classes([str(folder)], [tokenizer, None])
    with pytest.raises(ConfigError, match=r"has no tokenizer.*reward_processing_classes"):
        GRPOTrainer(
            make_model("llama"),
            reward_model(tokenizer),
            GRPOConfig(str(tmp_path), max_completion_length=4, use_cpu=True),
            ROWS,
            processing_class=tokenizer,
            terminal=Terminal(quiet=True),
        )


def test_a_head_that_the_weights_do_not_have_is_not_drawn_at_random(
    tokenizer: Any, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    """transformers would make one with a warning, and TRL would train on its scores."""
    model = make_model("llama")
    model.config.architectures = None
    model.save_pretrained(tmp_path / "headless")
    facts = (tmp_path / "headless" / "config.json").read_text().replace('"LlamaForCausalLM"', "")
    (tmp_path / "headless" / "config.json").write_text(facts)
    tokenizer.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="no head with one output"):
        ModelReward(str(tmp_path / "headless")).place("cpu")
