"""What a script reads after training and evaluating: results, the log's numbers, attributes, files; its overrides."""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.config import ConfigError
from llm_pg.metrics import read_metrics
from llm_pg.run.ranks import merge_metrics
from llm_pg.terminal import Terminal
from tests.tiny import SMALL_RUN, digits

ROWS = [{"prompt": f"{a}+{b}=", "sum": a + b} for a in range(4) for b in range(4)]
SETTINGS = {**SMALL_RUN, "max_steps": 3}


def accurate(completions: list[str], log_metric: Any, **_: Any) -> list[float]:
    log_metric("accuracy", 0.75)
    return [float(len(set(text))) for text in completions]


@pytest.fixture
def trainer(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def make(
        kind: Any = GRPOTrainer,
        rewards: Any = digits,
        model: Any = None,
        optimizers: Any = None,
        eval_dataset: Any = None,
        callbacks: Any = None,
        **changes: Any,
    ) -> Any:
        return kind(
            model=model or make_model("llama"),
            reward_funcs=rewards,
            args=GRPOConfig(str(tmp_path), **{**SETTINGS, **changes}),
            train_dataset=ROWS,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            processing_class=tokenizer,
            optimizers=optimizers,
            terminal=Terminal(quiet=True),
        )

    return make


# --- train()


def test_train_returns_the_summary_with_the_fields_of_transformers_train_output(trainer: Callable[..., Any]) -> None:
    made = trainer(entropy_coef=0.1)
    result = made.train()
    lines = read_metrics(made.folder.metrics)
    assert result == json.loads((made.folder.path / "summary.json").read_text())
    assert result.global_step == result["steps"] == 3
    assert result.training_loss == pytest.approx(statistics.mean(line["loss"] for line in lines))
    per_second = result.metrics["train_samples_per_second"] / result.metrics["train_steps_per_second"]
    assert per_second == pytest.approx(8, rel=0.01)  # completions of a step
    assert 0 < result.metrics["train_runtime"] < 600
    assert made.state.log_history[-1]["train_loss"] == result.training_loss


def test_the_loss_that_is_logged_has_the_entropy_bonus(trainer: Callable[..., Any]) -> None:
    made = trainer(entropy_coef=0.1, num_iterations=2, max_steps=4)
    made.train()
    for line in read_metrics(made.folder.metrics):
        assert line["loss"] == pytest.approx(line["policy_loss"] - 0.1 * line["entropy"], abs=1e-6)
        assert line["entropy"] > 1


def test_an_entry_of_the_log_is_the_mean_over_its_steps_as_with_trl(trainer: Callable[..., Any]) -> None:
    made = trainer(rewards=[digits, accurate], logging_steps=2)
    made.train()
    lines, (entry, last) = read_metrics(made.folder.metrics), made.state.log_history
    for theirs, ours in [("reward", "reward"), ("rewards/digits/mean", "reward/digits"), ("entropy", "entropy")]:
        assert entry[theirs] == pytest.approx(statistics.mean(line[ours] for line in lines[:2]))
        assert last[theirs] == pytest.approx(lines[2][ours])
    assert entry["grad_norm"] == lines[1]["grad_norm"]
    assert entry["accuracy"] == 0.75  # by the name that the function gave
    assert last["num_tokens"] == sum(line["tokens"] + line["prompt_tokens"] for line in lines)


def test_lengths_and_deviations_are_those_of_the_completions(trainer: Callable[..., Any]) -> None:
    made = trainer(rewards=[digits, accurate], log_completions=8)
    made.train()
    entries = made.state.log_history
    for step in (1, 2, 3):
        file = made.folder.path / "completions" / f"step-{step:06d}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        lengths = [len(row["ids"]) for row in rows]
        ended = [len(row["ids"]) for row in rows if not row["truncated"]] or [0]
        entry = entries[step - 1]
        assert (entry["completions/min_length"], entry["completions/max_length"]) == (min(lengths), max(lengths))
        assert entry["completions/mean_terminated_length"] == pytest.approx(statistics.mean(ended))
        assert entry["completions/min_terminated_length"] == min(ended)
        for name in ("digits", "accurate"):
            scores = [row["parts"][name] for row in rows]
            assert entry[f"rewards/{name}/std"] == pytest.approx(statistics.stdev(scores))


def test_every_name_that_trl_logs_is_logged_here(
    trainer: Callable[..., Any], make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    import trl
    from datasets import Dataset

    given = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 4, "logging_steps": 1}
    more = {"beta": 0.1, "entropy_coef": 0.1}
    make_model("llama").save_pretrained(tmp_path / "model")  # TRL loads its reference from there
    peer = trl.GRPOTrainer(
        str(tmp_path / "model"),
        digits,
        trl.GRPOConfig(str(tmp_path / "trl"), max_steps=2, use_cpu=True, bf16=False, report_to="none", **given, **more),
        Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    theirs = peer.train()
    made = trainer(**more)
    ours = made.train()
    missing = set(peer.state.log_history[0]) - set(made.state.log_history[0])
    assert missing == set()
    assert set(theirs.metrics) - set(ours.metrics) == set()
    assert set(peer.state.log_history[-1]) - set(made.state.log_history[-1]) == set()
    weights = sum(p.numel() for n, p in made.model.named_parameters() if n.endswith("proj.weight"))
    head = made.model.get_output_embeddings().weight.numel()
    assert ours.metrics["total_flos"] == made.state.total_flos
    assert 0 < made.state.total_flos <= 6 * (weights + head) * made.state.num_input_tokens_seen


def test_of_one_rank_the_extremes_of_clipping_are_its_means_and_of_two_each_ranks_own_share() -> None:
    parts = [
        {"completion_length": 2.0, "clip_ratio/low_mean": 0.1, "clip_ratio/high_mean": 0.05},
        {"completion_length": 6.0, "clip_ratio/low_mean": 0.3, "clip_ratio/high_mean": 0.0},
    ]
    alone = merge_metrics(parts[:1], [8])
    assert (alone["clip_ratio/low_min"], alone["clip_ratio/high_max"]) == (0.1, 0.05)
    both = merge_metrics(parts, [8, 8])  # 16 and 48 of 64 tokens: 6.4 of 16 were clipped below, 19.2 of 48
    assert both["clip_ratio/low_min"] == pytest.approx(0.4)
    assert both["clip_ratio/high_max"] == pytest.approx(0.2)  # 3.2 of 16
    assert both["clip_ratio/low_mean"] == pytest.approx(0.4)


# --- several sets, and the best


def test_several_sets_are_evaluated_between_steps_each_by_its_name(trainer: Callable[..., Any]) -> None:
    heard: list[dict[str, float]] = []

    class Hears(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            heard.append(metrics)

    sets = {"low": ROWS[:4], "high": ROWS[-6:]}
    made = trainer(
        eval_dataset=sets, eval_strategy="steps", eval_steps=1, max_steps=3, eval_num_samples=2, callbacks=[Hears()]
    )
    made.train()
    entries = [entry for entry in made.state.log_history if "eval_low_reward" in entry]
    assert [entry["step"] for entry in entries] == [1, 2]
    for entry, given in zip(entries, heard, strict=True):
        assert entry["eval_low_reward"] == entry["eval_reward"] == given["eval_low_reward"]
        assert entry["eval_high_reward"] == given["eval_high_reward"]
        assert "eval_high_pass@2" in entry
    found = made.evaluate(sets)
    assert set(found) >= {"eval_low_reward", "eval_high_reward"}


@pytest.mark.parametrize(
    ("metric", "logged", "decides"),
    [
        ("eval_reward", "eval_reward", "low"),
        ("reward", "eval_reward", "low"),
        ("eval_greedy_reward", "eval_greedy_reward", "low"),
        ("eval_high_reward", "eval_high_reward", "high"),
        ("eval_high_greedy", "eval_high_greedy", "high"),
    ],
)
def test_the_best_model_is_that_of_the_largest_logged_number_of_that_name(
    trainer: Callable[..., Any], metric: str, logged: str, decides: str
) -> None:
    sets = {"low": ROWS[:4], "high": ROWS[-6:]}
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "eval_num_samples": 2, "eval_on_start": False}
    best = {"metric_for_best_model": metric, "load_best_model_at_end": True}
    made = trainer(eval_dataset=sets, max_steps=4, learning_rate=0.1, **evaluated, **best)
    made.train()
    entries = [entry for entry in made.state.log_history if logged in entry]
    assert made.evaluator.name == decides
    assert len(entries) == 3
    largest = max(entry[logged] for entry in entries)
    assert made.state.best_metric >= largest - 1e-9
    if made.state.best_global_step < 4:  # the evaluation after the last step is no entry
        first = next(entry for entry in entries if entry[logged] == largest)
        assert (made.state.best_metric, made.state.best_global_step) == (pytest.approx(largest), first["step"])


def test_a_best_model_by_a_set_that_is_not_there_is_refused(trainer: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="'eval/hihg_reward', and there is no set of that name"):
        trainer(eval_dataset={"high": ROWS}, eval_strategy="steps", metric_for_best_model="eval_hihg_reward")


# --- evaluate()


def test_evaluate_takes_a_dataset_and_several_by_name(trainer: Callable[..., Any]) -> None:
    made = trainer(eval_num_samples=2)
    heard: list[dict[str, float]] = []

    class Seen(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            heard.append(metrics)

    made.add_callback(Seen)
    result = made.evaluate(ROWS[:5])
    assert result.evaluation.num_prompts == result.num_prompts == 5
    assert result["eval_reward"] == result.sampled_reward.mean
    assert result["eval_greedy_reward"] == result.reward.mean
    assert heard == [dict(result)]
    assert made.state.log_history[-1] == {**result, "step": 0}
    both = made.evaluate({"small": ROWS[:3], "large": ROWS[3:]}, metric_key_prefix="test")
    assert {"test_small_reward", "test_large_reward", "test_small_greedy", "test_large_runtime"} <= set(both)
    assert made.evaluate({"small": ROWS[:3]})["eval_small_greedy_reward"] == both["test_small_greedy_reward"]


def test_a_text_that_names_no_set_is_refused(trainer: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="evaluate got the name 'After'"):
        trainer().evaluate("After")


# --- attributes, files


def test_a_script_reads_the_attributes_of_a_trainer(trainer: Callable[..., Any]) -> None:
    made = trainer(rewards=[digits, accurate], beta=0.1, reward_weights=[1.0, 0.5])
    assert made.train_dataset is ROWS
    assert made.eval_dataset is None
    assert made.reward_funcs == [digits, accurate]
    assert made.reward_func_names == ["digits", "accurate"]
    assert made.reward_weights.tolist() == [1.0, 0.5]
    assert (made.optimizer, made.lr_scheduler, made.aux_loss_enabled) == (None, None, False)
    assert made.is_world_process_zero()
    assert made.is_local_process_zero()
    batches = list(made.get_train_dataloader())
    assert [len(batch) for batch in batches] == [8] * 8
    assert batches[0][0] == batches[0][3] != batches[0][4]  # four completions of each of two prompts
    before = {name: p.clone() for name, p in made.ref_model.named_parameters()}
    made.train()
    assert all(torch.equal(before[name], p) for name, p in made.ref_model.named_parameters())
    assert made.lr_scheduler.get_last_lr() == [1e-2]
    assert made.callback_handler.callbacks == []


def test_args_are_read_as_trls_are(tmp_path: Path) -> None:
    args = GRPOConfig(str(tmp_path), use_cpu=True)
    assert (args.beta, args.epsilon, args.loss_type, args.scale_rewards) == (0.0, 0.2, "dapo", "group")
    assert GRPOConfig(loss_type="dr_grpo", scale_rewards=False, beta=0.04).beta == 0.04
    assert (args.device, args.n_gpu, args.world_size, args.process_index) == (torch.device("cpu"), 0, 1, 0)
    assert args.should_save
    assert args.get_process_log_level() > 0
    assert args.get_warmup_steps(100) == 0
    assert json.loads(args.to_json_string())["learning_rate"] == args.to_dict()["learning_rate"] == 1e-6


def test_metrics_and_state_are_written_as_transformers_writes_them(
    trainer: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = trainer(max_steps=1)
    metrics = made.train().metrics
    made.log_metrics("train", metrics)
    assert "train_runtime" in capsys.readouterr().out
    made.save_metrics("train", metrics)
    made.save_state()
    assert json.loads((tmp_path / "train_results.json").read_text()) == metrics
    assert json.loads((tmp_path / "all_results.json").read_text()) == metrics
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert (state["global_step"], state["log_history"]) == (1, made.state.log_history)


# --- overrides


def test_log_of_a_subclass_takes_every_entry(trainer: Callable[..., Any]) -> None:
    class Mine(GRPOTrainer):
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log({**logs, "mine": logs.get("reward", math.nan) * 2}, start_time)

    made = trainer(Mine)
    made.train()
    assert len(made.state.log_history) == 4
    assert all(entry["mine"] == entry["reward"] * 2 for entry in made.state.log_history)


def test_the_optimiser_and_schedule_of_a_subclass_train(trainer: Callable[..., Any]) -> None:
    class Mine(GRPOTrainer):
        def create_optimizer(self) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
            return self.optimizer

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
            return self.lr_scheduler

    made = trainer(Mine)
    made.train()
    assert isinstance(made.optimizer, torch.optim.SGD)
    assert [line["learning_rate"] for line in read_metrics(made.folder.metrics)] == [0.5, 0.25, 0.125]


def test_optimizers_that_are_given_train(trainer: Callable[..., Any], make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    made = trainer(model=model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.25), None))
    made.train()
    assert [line["learning_rate"] for line in read_metrics(made.folder.metrics)] == [0.25] * 3
    other = torch.optim.SGD(make_model("llama").parameters(), lr=0.25)
    with pytest.raises(ConfigError, match="0 of them among the"):
        trainer(optimizers=(other, None), overwrite=True).train()


@pytest.mark.parametrize("name", ["compute_loss", "training_step", "_calculate_rewards", "prediction_step"])
def test_an_override_that_would_never_be_called_is_refused_by_name(name: str, trainer: Callable[..., Any]) -> None:
    kind = type("Mine", (GRPOTrainer,), {name: lambda self, *a, **k: None})
    with pytest.raises(ConfigError, match=rf"Mine\.{name} overrides a method of TRL's trainer that is never called"):
        trainer(kind)


def test_methods_of_ones_own_are_no_overrides(trainer: Callable[..., Any]) -> None:
    kind = type("Mine", (GRPOTrainer,), {"my_helper": lambda self: 1, "algorithms": ("grpo", "dapo")})
    assert trainer(kind).my_helper() == 1


def test_the_reward_is_clipped_to_the_range_that_is_given(trainer: Callable[..., Any]) -> None:
    made = trainer(rewards=accurate, reward_clip_range=(1.5, 2.5), log_completions=8)
    made.train()
    for file in sorted((made.folder.path / "completions").iterdir()):
        for row in map(json.loads, file.read_text().splitlines()):
            assert row["reward"] == min(max(row["parts"]["accurate"], 1.5), 2.5)


def test_a_head_in_float32_is_taken_in_every_precision(
    trainer: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    """Its logits are float32 there, whatever its inputs are."""
    assert trainer(cast_lm_head_to_fp32=True).model.lm_head.weight.dtype == torch.float32
    trainer(cast_lm_head_to_fp32=True, bf16=True)
    trainer(cast_lm_head_to_fp32=True, model=make_model("llama").to(torch.bfloat16))


def test_what_scripts_import_from_trl_is_imported_from_here_too() -> None:
    import trl

    import llm_pg

    for name in ("ModelConfig", "ScriptArguments", "get_peft_config", "get_quantization_config", "get_dataset"):
        assert getattr(llm_pg, name) is getattr(trl, name)


def test_the_completions_that_off_policy_masking_keeps_are_those_of_trls_method() -> None:
    import trl

    generator = torch.Generator().manual_seed(3)
    theirs, ours = (library.get_off_policy_mask for library in (trl.GRPOTrainer, GRPOTrainer))
    mask_BT = (torch.arange(5) < torch.tensor([[5], [3], [1], [4], [2], [5]])).float()
    for threshold in (0.05, 0.3, 2.0):
        logp_BT, behavior_logp_BT = -3 * torch.rand(2, 6, 5, generator=generator)
        advantage_B1 = torch.randn(6, 1, generator=generator)
        given = (advantage_B1, logp_BT, behavior_logp_BT, mask_BT, threshold)
        assert torch.equal(ours(*given), theirs(*given))


def test_the_tokens_of_largest_entropy_are_those_of_trls_method(trainer: Callable[..., Any]) -> None:
    import trl

    generator = torch.Generator().manual_seed(3)
    entropy_BT = torch.rand(3, 7, generator=generator)
    mask_BT = torch.arange(7) < torch.tensor([[7], [4], [1]])
    made = trainer()
    for threshold in (0.0, 0.3, 0.8, 1.0):
        theirs = trl.GRPOTrainer.get_high_entropy_mask(made, entropy_BT, mask_BT, threshold)
        assert torch.equal(made.get_high_entropy_mask(entropy_BT, mask_BT.long(), threshold), theirs)
    assert not made.get_high_entropy_mask(entropy_BT, torch.zeros_like(mask_BT), 0.5).any()
