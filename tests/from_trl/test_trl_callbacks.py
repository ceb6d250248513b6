"""transformers' TrainerCallbacks on our trainers: their events, their wishes, and what a script reads afterwards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from llm_pg import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from llm_pg.config import ConfigError
from llm_pg.evaluate import Interval
from llm_pg.metrics import read_metrics
from llm_pg.terminal import Terminal
from tests.tiny import SMALL_RUN, digits

ROWS = [{"prompt": f"{a}+{b}="} for a in range(4) for b in range(4)]
SETTINGS = {**SMALL_RUN, "max_steps": 4}


class Recorder(TrainerCallback):
    """Writes down every event, what it was given, and answers as `wishes` says."""

    def __init__(self, **wishes: int) -> None:
        self.events: list[tuple[str, int]] = []
        self.wishes = wishes
        self.logs: list[dict[str, float]] = []
        self.metrics: list[dict[str, float]] = []
        self.offered: set[str] = set()

    def _note(self, event: str, state: Any, given: dict[str, Any]) -> None:
        self.events.append((event, state.global_step))
        self.offered |= {name for name, value in given.items() if value is not None}

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> Any:
        self._note("on_step_end", state, given)
        for wish, step in self.wishes.items():
            setattr(control, wish, state.global_step == step)
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        self._note("on_log", state, given)
        self.logs.append(logs)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **given: Any) -> None:
        self._note("on_evaluate", state, given)
        self.metrics.append(metrics)


def _noting(event: str) -> Callable[..., None]:
    def method(self: Recorder, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._note(event, state, given)

    return method


for _event in ("init_end", "train_begin", "train_end", "epoch_begin", "epoch_end", "step_begin", "save"):
    setattr(Recorder, f"on_{_event}", _noting(f"on_{_event}"))
for _event in ("pre_optimizer_step", "optimizer_step"):
    setattr(Recorder, f"on_{_event}", _noting(f"on_{_event}"))


@pytest.fixture
def trainer(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def make(callbacks: Any, kind: Any = GRPOTrainer, config: Any = GRPOConfig, **changes: Any) -> Any:
        return kind(
            model=make_model("llama"),
            reward_funcs=digits,
            args=config(str(tmp_path), **{**SETTINGS, **changes}),
            train_dataset=ROWS,
            processing_class=tokenizer,
            callbacks=callbacks,
            terminal=Terminal(quiet=True),
        )

    return make


@pytest.mark.parametrize("kind, config", [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_the_events_of_two_steps_come_in_transformers_order(
    kind: Any, config: Any, trainer: Callable[..., Any]
) -> None:
    seen = Recorder()
    trainer([seen], kind, config, max_steps=2, save_steps=2).train()
    one = ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log"]
    expected = ["on_init_end", "on_train_begin", "on_epoch_begin", *one, *one, "on_save", "on_log", "on_train_end"]
    assert [event for event, _ in seen.events] == expected
    assert [step for event, step in seen.events if event == "on_step_begin"] == [0, 1]
    assert [step for event, step in seen.events if event == "on_step_end"] == [1, 2]
    assert seen.offered == {"model", "processing_class", "optimizer", "lr_scheduler"}


def test_an_epoch_ends_when_every_prompt_had_its_turn(trainer: Callable[..., Any]) -> None:
    seen = Recorder()
    made = trainer([seen], max_steps=16)  # 2 prompts a step, 16 prompts
    made.train()
    assert [step for event, step in seen.events if event == "on_epoch_end"] == [8, 16]
    assert [step for event, step in seen.events if event == "on_epoch_begin"] == [0, 8]
    assert made.state.epoch == 2.0
    assert made.state.num_train_epochs == 2


def test_each_update_of_a_reused_batch_is_an_optimizer_step(trainer: Callable[..., Any]) -> None:
    seen = Recorder()
    trainer([seen], max_steps=8, num_iterations=2, gradient_accumulation_steps=1, steps_per_generation=2).train()
    names = [event for event, _ in seen.events]
    assert (names.count("on_step_end"), names.count("on_optimizer_step")) == (2, 8)


def test_logs_have_the_metrics_and_trls_names_for_them(trainer: Callable[..., Any]) -> None:
    seen = Recorder()
    made = trainer([seen], max_steps=2)
    made.train()
    lines = read_metrics(made.folder.metrics)
    for logs, line in zip(seen.logs[:-1], lines, strict=True):
        assert {name: logs[name] for name in line} == line
        assert logs["clip_ratio/region_mean"] == line["clip_fraction"]
        assert logs["rewards/digits/mean"] == line["reward/digits"]
        assert logs["completions/mean_length"] == line["completion_length"]
    rewards = [line["reward"] for line in lines]
    assert [entry["reward"] for entry in made.state.log_history] == [*rewards, rewards[-1]]
    assert [entry["step"] for entry in made.state.log_history] == [1, 2, 2]


def test_on_log_comes_every_logging_steps_and_when_it_is_asked_for(trainer: Callable[..., Any]) -> None:
    seen = Recorder(should_log=3)
    trainer([seen], logging_steps=2).train()
    assert [step for event, step in seen.events if event == "on_log"] == [2, 3, 4, 4]


def test_a_callback_ends_the_run_after_its_step_and_the_model_is_saved(trainer: Callable[..., Any]) -> None:
    seen = Recorder(should_training_stop=2)
    made = trainer([seen])
    summary = made.train()
    assert summary["steps"] == 2
    assert len(read_metrics(made.folder.metrics)) == 2
    assert (made.folder.model / "model.safetensors").exists()
    assert seen.events[-1] == ("on_train_end", 2)


def test_a_callback_gets_the_checkpoint_it_asks_for(trainer: Callable[..., Any]) -> None:
    seen = Recorder(should_save=3)
    made = trainer([seen])
    made.train()
    assert "step-000003" in [path.name for path in made.folder.checkpoints.iterdir() if path.is_dir()]
    assert ("on_save", 3) in seen.events


def test_a_callback_gets_the_evaluation_it_asks_for(trainer: Callable[..., Any]) -> None:
    seen = Recorder(should_evaluate=2)
    made = trainer([seen], eval_strategy="steps", eval_steps=100, num_eval_prompts=4, eval_num_samples=1)
    made.train()
    assert [step for event, step in seen.events if event == "on_evaluate"] == [2]
    assert seen.metrics[0]["eval_greedy"] == read_metrics(made.folder.metrics)[1]["eval/greedy"]


def test_a_run_that_its_evaluation_ends_is_evaluated_once(trainer: Callable[..., Any]) -> None:
    class Enough(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = True

    made = trainer([Enough()], eval_strategy="steps", eval_steps=2, num_eval_prompts=4, eval_num_samples=1)
    evaluate, titles = made.evaluator.evaluate, []
    made.evaluator.evaluate = lambda title: (titles.append(title), evaluate(title))[1]
    summary = made.train()
    assert titles == ["Before", "Step 2"]
    assert summary["pass_rate_after"] == read_metrics(made.folder.metrics)[1]["eval/greedy"]


@pytest.mark.parametrize("readings, steps", [([0.5, 0.5, 0.25, 1.0], 3), ([0.25, 0.5, 0.25, 1.0], 4)])
def test_early_stopping_ends_a_run_whose_evaluations_do_not_rise(
    readings: list[float], steps: int, trainer: Callable[..., Any]
) -> None:
    """Patience 2; the model before the first step reads 0.25."""
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "num_eval_prompts": 4, "eval_num_samples": 1}
    made = trainer([EarlyStoppingCallback(2)], **evaluating, metric_for_best_model="eval/greedy")
    evaluate = made.evaluator.evaluate

    def read(title: str) -> Any:
        result = evaluate(title)
        value = [0.25, *readings][made.run.step]
        result.greedy = Interval(value, value, value)
        return result

    made.evaluator.evaluate = read
    assert made.train()["steps"] == steps
    assert made.state.best_metric == 0.5


@pytest.mark.parametrize("event", ["on_train_begin", "on_step_begin", "on_optimizer_step", "on_step_end", "on_log"])
def test_an_exception_in_a_callback_ends_the_run_and_propagates(event: str, trainer: Callable[..., Any]) -> None:
    class Broken(TrainerCallback):
        pass

    def fail(self: Any, *_: Any, **__: Any) -> None:
        raise RuntimeError("mine")

    setattr(Broken, event, fail)
    with pytest.raises(RuntimeError, match="mine"):
        trainer([Broken]).train()


def test_what_is_no_callback_is_refused(trainer: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"no transformers\.TrainerCallback"):
        trainer([digits])


def test_callbacks_are_added_and_taken_out(trainer: Callable[..., Any]) -> None:
    made, seen = trainer([]), Recorder()
    made.add_callback(seen)
    assert made.pop_callback(Recorder) is seen
    assert made.pop_callback(seen) is None
    made.add_callback(Recorder)
    made.remove_callback(Recorder)
    assert made.callbacks.callbacks == []


def test_callbacks_change_no_number_of_the_run(trainer: Callable[..., Any]) -> None:
    def rewards(callbacks: Any) -> list[Any]:
        made = trainer(callbacks, overwrite=True)
        made.train()
        return [(line["reward"], line["grad_norm"]) for line in read_metrics(made.folder.metrics)]

    assert rewards([Recorder()]) == rewards(None)


def test_a_resumed_run_goes_on_with_the_history_of_the_first(trainer: Callable[..., Any]) -> None:
    whole = trainer(None, run_name="whole")
    whole.train()
    first = trainer([Recorder(should_save=2, should_training_stop=2)])
    first.train()
    second = trainer(None)
    second.train(resume_from_checkpoint=str(first.folder.checkpoints / "step-000002"))
    assert second.state.global_step == 4
    assert [entry["step"] for entry in second.state.log_history] == [1, 2, 3, 4, 4]
    assert [e["reward"] for e in second.state.log_history] == [e["reward"] for e in whole.state.log_history]
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value, rtol=0, atol=0)


def test_resume_from_checkpoint_false_or_none_begins_anew(trainer: Callable[..., Any]) -> None:
    assert trainer(None).train(resume_from_checkpoint=None)["steps"] == 4
    assert trainer(None, overwrite=True).train(resume_from_checkpoint=False)["steps"] == 4


def test_what_scripts_read_and_call_afterwards(trainer: Callable[..., Any], tmp_path: Path) -> None:
    made = trainer(None, lr_scheduler_type="cosine", lr_scheduler_kwargs={"num_cycles": 1.0}, max_steps=2)
    made.train()
    assert made.args.learning_rate == 1e-2
    assert made.args.load_best_model_at_end is False
    assert made.processing_class is made.tokenizer
    assert read_metrics(made.folder.metrics)[1]["learning_rate"] == pytest.approx(
        0.0, abs=1e-12
    )  # a full cosine's trough
    made.save_model(tmp_path / "mine")
    assert (tmp_path / "mine" / "config.json").exists()


def test_a_run_without_evaluation_ends_with_no_pass_rate(trainer: Callable[..., Any]) -> None:
    made = trainer(None, max_steps=1)
    summary = made.train()
    assert (summary["pass_rate_after"], summary["num_eval_prompts"], summary["pass_at"]) == (None, 0, {})
    assert len(made.train_prompts) == len(ROWS)


@pytest.mark.parametrize("column", ["tools", "image", "images"])
def test_a_column_that_means_something_to_trl_is_refused(
    column: str, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{**row, column: "x"} for row in ROWS]
    with pytest.raises(ConfigError, match=f"column '{column}'.*rename it"):
        GRPOTrainer(
            make_model("llama"), digits, GRPOConfig(str(tmp_path), **SETTINGS), rows, processing_class=tokenizer
        )


@pytest.mark.parametrize(
    "reward, words",
    [
        ("org/reward-model", "'org/reward-model' cannot be loaded"),
        (torch.nn.Linear(1, 1), r"Linear has no tokenizer.*reward_processing_classes"),
    ],
)
def test_a_reward_model_that_is_none_is_refused_before_the_run(
    reward: Any, words: str, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        GRPOTrainer(
            make_model("llama"), reward, GRPOConfig(str(tmp_path), **SETTINGS), ROWS, processing_class=tokenizer
        )
