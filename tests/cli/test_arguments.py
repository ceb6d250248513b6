"""Settings as people write them on a command line, and what a run or an evaluation is made of without a YAML file."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

from llm_pg.cli import main
from llm_pg.config import ConfigError, load_config
from llm_pg.config.arguments import as_settings, help_text
from llm_pg.config.schema import LEAVES, TRACKERS, Config
from llm_pg.metrics import read_metrics


def settings(*words: str) -> Config:
    return load_config(None, as_settings(words, {"--resume"}))


@pytest.mark.parametrize(
    "more, wanted",
    [
        ([], "Data: 20 rows read, 4 of them held out."),
        (["num_eval_prompts=0"], "Data: 20 rows read."),
        (["eval_data_files={tmp}/other.jsonl"], "Data: 20 rows to train on, 4 of 6 rows held out."),
        (["--audit-rewards"], "Data: 20 rows read, 4 of them held out."),
    ],
)
def test_check_says_how_many_rows_it_read(
    more: list[str], wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("rows", 20), ("other", 6)):
        lines = [json.dumps({"prompt": f"{name} {i}", "answer": str(i)}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    given = [f"data_files={tmp_path}/rows.jsonl", "reward_funcs=[exact_match]", "prompts_per_step=2"]
    given.append("num_eval_prompts=4")
    made = "model.make={model_type: llama, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}"
    main(["check", made, f"output_dir={tmp_path}", *given, *(word.format(tmp=tmp_path) for word in more)])
    assert wanted in capsys.readouterr().out


def test_four_ways_to_write_a_setting_mean_the_same() -> None:
    forms = (["learning_rate=3e-6"], ["--learning_rate", "3e-6"], ["--learning_rate=3e-6"], ["--learning-rate", "3e-6"])
    for form in forms:
        assert settings(*form).train.learning_rate == 3e-6
    assert settings("--train.learning_rate", "3e-6").train.learning_rate == 3e-6


def test_a_flag_without_a_value_is_true_and_a_negative_number_is_a_value() -> None:
    found = settings("--bf16", "--use_peft", "--reward_weights", "-1", "0.5")
    assert (found.train.bf16, found.model.use_peft, found.reward.reward_weights) == (True, True, [-1.0, 0.5])


def test_a_list_takes_every_word_up_to_the_next_option_or_yaml_file() -> None:
    words = as_settings(["--reward_funcs", "number_match", "format_tags", "mine.yaml", "--seed", "3"], ())
    assert words == ['reward_funcs=["number_match", "format_tags"]', "mine.yaml", "seed=3"]


def test_trl_s_names_of_splits_and_the_algorithm_s_own_word_are_understood() -> None:
    found = settings("--algorithm", "rloo", "--dataset_train_split", "a", "--dataset_test_split", "b")
    assert (found.algorithm.name, found.data.dataset_split, found.data.dataset_eval_split) == ("rloo", "a", "b")


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_every_setting_can_be_written_as_an_option(leaf: str) -> None:
    assert as_settings([f"--{leaf}=1"], ()) == [f"{leaf}=1"]


@pytest.mark.parametrize("text", ["{question} = ?", "{question}", "no", "3", "a: b"])
def test_text_is_taken_as_it_is_written(text: str) -> None:
    assert settings("--prompt_template", text).data.prompt_template == text
    assert settings(f"prompt_template={text}").data.prompt_template == text


def test_an_option_that_nobody_knows_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'--learnin_rate'.*Did you mean '--learning_rate'"):
        as_settings(["--learnin_rate", "1"], ())
    with pytest.raises(ConfigError, match=r"'--data.seed'"):
        as_settings(["--data.seed", "1"], ())


def test_the_help_names_every_setting_and_the_choices_of_every_word() -> None:
    text = help_text()
    for section in Config.model_fields.values():
        for name, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            line = next(line for line in text.splitlines() if line.startswith(f"  {name}="))
            if get_origin(field.annotation) is not None and all(isinstance(a, str) for a in get_args(field.annotation)):
                assert "{" + "|".join(get_args(field.annotation)) + "}" in line
    for leaf, word in (("baseline", "leave_one_out"), ("loss_type", "dr_grpo"), ("name", "reinforce")):
        assert re.search(rf"^  {leaf}=\S+ {{[^}}]*{word}", text, re.MULTILINE), leaf


@pytest.mark.parametrize(
    "words, trackers", [("wandb", ["wandb"]), ("none", []), ("[wandb, trackio]", ["wandb", "trackio"])]
)
def test_one_tracker_is_a_list_of_one(words: str, trackers: list[str]) -> None:
    assert load_config(None, [f"report_to={words}"]).run.report_to == trackers


def test_all_trackers_are_those_that_are_installed() -> None:
    found = load_config(None, ["report_to=all"]).run.report_to
    assert "wandb" in found
    assert set(found) <= set(TRACKERS)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/tmp/x", " "])
def test_a_run_s_name_cannot_leave_its_output_folder(name: str) -> None:
    with pytest.raises(ConfigError, match=r"run_name .* is no folder inside output_dir"):
        load_config(None, [f"run_name={name!r}"])
    assert load_config(None, ["run_name=group/one"]).run.run_name == "group/one"


@pytest.fixture
def model(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> str:
    make_model("qwen2", max_position_embeddings=256).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def rows(path: Path, n: int = 24) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(n)))
    return path


SMALL = ["--max_steps", "1", "--prompts_per_step", "2", "--num_generations", "2", "--max_completion_length", "4"]
SMALL += ["--num_eval_prompts", "4", "--eval_num_samples", "0", "--noise_steps", "0"]


def test_a_run_needs_no_yaml_and_is_evaluated_by_its_folder_its_model_and_another_file(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(rows(tmp_path / "rows.jsonl"))
    command = ["train", "--model", model, "--data", data, "--reward", "number_match"]
    assert main([*command, *SMALL, "--output_dir", str(tmp_path / "runs"), "--run_name", "one", "--quiet"]) == 0
    run = tmp_path / "runs" / "one"
    assert len(read_metrics(run / "metrics.jsonl")) == 1
    after = json.loads((run / "summary.json").read_text())["pass_rate_after"]
    for place in (run, run / "model"):
        capsys.readouterr()
        assert main(["eval", str(place), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["eval/greedy"] == after
    assert main(["eval", str(run), "--data", str(rows(tmp_path / "more.jsonl", 7))]) == 0
    assert "(7 held-out prompts)" in capsys.readouterr().out


def test_an_adapter_s_run_is_evaluated_on_the_model_that_it_was_trained_on(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["task=sort_letters", f"model_name_or_path={model}", "use_peft=true", "learning_rate=0.05", "run_name=lora"]
    assert main(["train", *given, *SMALL, f"output_dir={tmp_path}", "--quiet"]) == 0
    after = json.loads((tmp_path / "lora" / "summary.json").read_text())
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "lora" / "model"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["eval/length"] == after["mean_length_after"]
    assert found["eval/greedy"] == after["pass_rate_after"]


@pytest.mark.faults
def test_a_run_that_has_no_model_yet_and_a_model_without_data_are_named(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("data: {task: sort_letters}\n")
    assert main(["eval", str(tmp_path / "begun")]) == 2
    assert "has no model/ yet" in capsys.readouterr().err
    assert main(["eval", model]) == 2
    assert re.search(r"--task NAME, or --data .* or name the folder of a run", capsys.readouterr().err)


def test_a_stream_of_few_rows_shrinks_the_held_out_set_as_a_list_does(model: str, tmp_path: Path) -> None:
    import datasets

    from llm_pg import GRPOConfig, GRPOTrainer

    listed = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(16)]
    stream = datasets.Dataset.from_list(listed).to_iterable_dataset()
    sizes = []
    for data in (listed, stream, (row for row in listed)):
        args = GRPOConfig(str(tmp_path), num_generations=2, max_completion_length=4, use_cpu=True)
        trainer = GRPOTrainer(model, "number_match", args, data)
        sizes.append((len(trainer.train_prompts), len(trainer.eval_prompts), trainer.context.plan.prompts))
    assert sizes == [(12, 4, 8)] * 3


@pytest.mark.parametrize("words", [["algorithm=rloo"], ["name=rloo"], ["--algorithm", "rloo"], ["algorithm.name=rloo"]])
def test_a_setting_of_the_quickstart_replaces_what_its_options_would_set(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`llm-pg quickstart algorithm=rloo` had said that the algorithm was given twice."""
    seen: list[Config] = []
    monkeypatch.setattr("llm_pg.cli.run_training", lambda config, **_: seen.append(config) or 0)
    assert main(["quickstart", *words, "seed=7"]) == 0
    assert (seen[0].algorithm.name, seen[0].run.seed, seen[0].data.task) == ("rloo", 7, "sort_letters")


def test_the_older_spelling_of_a_word_still_loads() -> None:
    config = load_config(None, ["task=sort_letters", "truncated=penalise", "truncation_penalty=0.5"])
    assert config.algorithm.truncated == "penalize"
