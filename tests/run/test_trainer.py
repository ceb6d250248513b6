"""The loop from prompts to a saved model, on tiny models made here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_pg import (
    GRPOConfig,
    GRPOTrainer,
    PolicyGradientTrainer,
    ReinforceConfig,
    ReinforceTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from llm_pg.config import Config, ConfigError
from llm_pg.doctor import examine_run
from llm_pg.metrics import read_metrics
from llm_pg.terminal import Terminal
from tests.seams import Steps, raising

ROWS = [{"prompt": f"{a}+{b}=", "answer": str((a + b) % 10)} for a in range(8) for b in range(8)]
SMALL = {
    "max_steps": 3,
    "prompts_per_step": 4,
    "num_generations": 4,
    "max_completion_length": 4,
    "num_eval_prompts": 8,
    "eval_num_samples": 2,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "reward_in_process": True,
}
TRAINERS = [(ReinforceTrainer, ReinforceConfig), (RLOOTrainer, RLOOConfig), (GRPOTrainer, GRPOConfig)]


def first_digit(completion: str, answer: str, **row: Any) -> float:
    return float(completion[:1] == answer)


def begins_with_a_digit(completion: str, **row: Any) -> float:
    return float(completion[:1].isdigit())


class Killed(Exception):
    pass


@pytest.fixture
def train(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def run(
        kind: Any = GRPOTrainer,
        config: Any = GRPOConfig,
        reward: Any = first_digit,
        resume: bool = False,
        dies_at: int = 0,
        **changes: Any,
    ) -> Any:
        trainer = kind(
            model=make_model("llama"),
            reward_funcs=reward,
            args=config(str(tmp_path), **{**SMALL, "run_name": "r", **changes}),
            train_dataset=ROWS,
            processing_class=tokenizer,
            terminal=Terminal(quiet=True),
            callbacks=[Steps(after=raising(Killed, dies_at))],
        )
        trainer.summary = trainer.train(resume=resume)
        return trainer

    return run


@pytest.mark.parametrize("kind, config", TRAINERS)
def test_each_trainer_writes_a_whole_run_folder(kind: Any, config: Any, train: Callable[..., Any]) -> None:
    trainer = train(kind, config, beta=0.05)
    folder = trainer.folder.path
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    # Where no reward and no distance to the reference tells completions apart, nothing is updated.
    assert all(
        abs(line.get("sampler_gap", 0.0)) < 1e-5 and line["kl"] >= 0 and line["grad_norm"] >= 0 for line in lines
    )
    summary = json.loads((folder / "summary.json").read_text())
    wanted = {"algorithm", "task", "seed", "pass_rate_before", "pass_rate_after", "sampled_before", "sampled_after"}
    assert wanted | {"seconds_total", "seconds_by_phase", "steps", "model"} <= set(summary)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = AutoTokenizer.from_pretrained(folder / "model")("1+2=", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(model(ids).logits, trainer.model.eval()(ids).logits)
    rows = [json.loads(line) for line in (folder / "completions" / "step-000001.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    assert all(len(r["ids"]) == len(r["tokens"]["logp"]) == len(r["tokens"]["weight"]) for r in rows)


@pytest.mark.parametrize("kind, config", TRAINERS)
def test_each_trainer_learns_to_begin_with_a_digit(kind: Any, config: Any, train: Callable[..., Any]) -> None:
    trainer = train(
        kind, config, reward=begins_with_a_digit, max_steps=40, prompts_per_step=16, max_completion_length=2
    )
    assert trainer.summary["sampled_before"] < 0.3
    assert trainer.summary["sampled_after"] > 0.9


def short_of_five(completion: str, **row: Any) -> float:
    """Dense, and never a pass at the threshold 1."""
    return -abs(5.0 - sum(c.isdigit() for c in completion))


@pytest.mark.faults
def test_a_dense_reward_is_told_held_out_everywhere_and_chooses_the_best_model(
    train: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"eval_steps": 1, "metric_for_best_model": "eval_greedy_reward", "max_completion_length": 6, "max_steps": 8}
    trainer = train(reward=short_of_five, **given)
    folder, summary = trainer.folder.path, trainer.summary
    assert summary["pass_rate_after"] == 0.0
    mean, low, high = summary["reward_after"]
    assert low <= mean <= high < 0
    assert summary["sampled_reward_after"][0] > summary["sampled_reward_before"][0]
    best = json.loads((trainer.folder.best / "best.json").read_text())
    told = {
        line["step"]: line["eval/reward"] for line in read_metrics(folder / "metrics.jsonl") if "eval/reward" in line
    }
    assert best["metric"] == "eval/reward"
    assert best["value"] == max([*told.values(), summary["reward_before"][0], mean])
    page = (folder / "report.html").read_text()
    assert "mean reward, greedy" in page
    assert "Held-out reward" in page
    assert "No completion reaches eval.pass_threshold 1" in page
    assert [f.rule for f in examine_run(folder)].count("threshold-unreached") == 1
    shown = capsys.readouterr().out
    assert "mean reward, greedy" in shown
    assert "No completion reaches eval.pass_threshold 1" in shown


def test_two_runs_with_the_same_seed_are_equal_and_another_seed_differs(train: Callable[..., Any]) -> None:
    def curve(**changes: Any) -> list[tuple[float, float]]:
        trainer = train(overwrite=True, reward=begins_with_a_digit, **changes)
        return [(line["reward"], line["grad_norm"]) for line in read_metrics(trainer.folder.metrics)]

    first = curve()
    assert curve() == first
    assert any(norm > 0 for _, norm in first)
    assert curve(seed=1) != first


@pytest.mark.faults
@pytest.mark.parametrize("kind, config", TRAINERS)
@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2, "steps_per_generation": 2, "surrogate": "clip"}])
def test_a_run_that_was_cut_goes_on_bit_for_bit(
    kind: Any, config: Any, changes: dict[str, Any], train: Callable[..., Any], tmp_path: Path
) -> None:
    """Killed after step 4 of 6 with a checkpoint at step 3: metrics and weights equal the uninterrupted run's."""
    changes = {**changes, "max_steps": 6, "beta": 0.05, "lr_scheduler_type": "linear", "warmup_steps": 2}
    if kind is ReinforceTrainer:
        changes["baseline"] = "running_mean"
    whole = train(kind, config, run_name="whole", **changes)

    with pytest.raises(Killed):
        train(kind, config, run_name="cut", save_steps=3, dies_at=4, **changes)
    resumed = train(kind, config, run_name="cut", save_steps=3, resume=True, **changes)

    timed = ("seconds", "tokens_per_second", "train_tokens_per_second", "mfu", "memory")
    lines = [
        [{k: v for k, v in line.items() if not k.startswith(timed)} for line in read_metrics(t.folder.metrics)]
        for t in (whole, resumed)
    ]
    assert lines[0] == lines[1]
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.summary["pass_rate_before"] == resumed.summary["pass_rate_before"]


@pytest.mark.faults
def test_resuming_with_other_settings_is_refused_with_what_differs(train: Callable[..., Any]) -> None:
    train(save_steps=2)
    with pytest.raises(ConfigError, match=r"train\.learning_rate +0\.01 +0\.02"):
        train(save_steps=2, learning_rate=2e-2, resume=True)


def test_a_folder_that_holds_a_run_is_not_overwritten_unasked(train: Callable[..., Any]) -> None:
    train()
    with pytest.raises(ConfigError, match="already holds a run"):
        train()


@pytest.mark.faults
def test_unscorable_completions_have_weight_zero_and_are_counted(train: Callable[..., Any]) -> None:
    def sometimes(completion: str, answer: str, **row: Any) -> float | None:
        return None if answer == "3" else first_digit(completion, answer)

    trainer = train(reward=sometimes, prompts_per_step=16, max_unscorable=1.0)
    lines = read_metrics(trainer.folder.metrics)
    assert any(line["unscorable"] > 0 for line in lines)
    for path in (trainer.folder.path / "completions").iterdir():
        for row in map(json.loads, path.read_text().splitlines()):
            if row["reward"] is None:
                assert set(row["tokens"]["weight"]) == {0.0}


def test_trl_style_rewards_and_conversational_prompts_run_unchanged(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    from datasets import Dataset

    seen: list[Any] = []

    def reward(prompts: Any, completions: Any, completion_ids: Any, answer: Any, **kwargs: Any) -> list[float]:
        seen.append((prompts[0], completions[0], kwargs.keys()))
        return [float(len(ids)) for ids in completion_ids]

    rows = [{"prompt": [{"role": "user", "content": r["prompt"]}], "answer": r["answer"]} for r in ROWS]
    GRPOTrainer(
        model=make_model("qwen2"),
        reward_funcs=[reward, first_digit],
        args=GRPOConfig(str(tmp_path), **{**SMALL, "reward_weights": [0.1, 1.0], "num_eval_prompts": 4}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        terminal=Terminal(quiet=True),
    ).train()
    prompt, completion, extra = seen[0]
    assert prompt[0]["role"] == "user"
    assert completion[0]["role"] == "assistant"
    assert "trainer_state" in extra


def test_lora_trains_the_adapter_alone(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    base = make_model("llama")
    before = {n: p.clone() for n, p in base.named_parameters()}
    trainer = GRPOTrainer(
        model=base,
        reward_funcs=begins_with_a_digit,
        args=GRPOConfig(str(tmp_path), **{**SMALL, "beta": 0.05}),
        train_dataset=ROWS,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        terminal=Terminal(quiet=True),
    )
    trainer.train()
    after = {
        n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in trainer.model.named_parameters()
    }
    assert all(torch.equal(p, after[n]) for n, p in before.items())
    assert trainer.policy.reference is None
    assert (trainer.folder.model / "adapter_model.safetensors").exists()


def test_a_trainer_refuses_the_row_of_another(make_model: Callable[..., Any], tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="RLOOTrainer runs rloo"):
        RLOOTrainer(make_model("llama"), first_digit, GRPOConfig(), ROWS, processing_class=tokenizer)


@pytest.mark.parametrize("kind", [Config, GRPOConfig])
def test_the_same_run_from_a_config_and_from_keywords(kind: Any) -> None:
    assert PolicyGradientTrainer.default_config().algorithm.name == "grpo"
    assert kind().rollout.num_generations == 8
