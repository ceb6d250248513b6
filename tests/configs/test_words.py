"""A setting whose value is a word refuses one that it does not know; the algorithm that is named is the one that runs.

The fields are read from the schema and from the row, so a new one is in these tests without a line here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from llm_pg.advise import Task
from llm_pg.algorithms.registry import register_algorithm
from llm_pg.algorithms.spec import AlgorithmSpec
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.config import ActorCriticConfig, Config, ConfigError, GRPOConfig, ReinforceConfig, RLOOConfig, load_config
from llm_pg.config.check import resolve_spec
from llm_pg.config.load import check_values
from llm_pg.config.schema import LEAVES, AlgorithmConfig
from llm_pg.control.settings import ControlSettings
from llm_pg.estimators.ratios import importance_ratio, sampler_correction
from llm_pg.model.critic import Critic
from llm_pg.model.policy import Policy
from llm_pg.plan import Model, PlannedJob, memory
from llm_pg.prove.worlds import WorldSpec
from llm_pg.run.build import make_scorer
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.words import annotations_of, words_of

# Texts that are no words of ours: names, paths, addresses, columns, templates.
FREE_TEXT = {
    "attn_implementation",
    "baseline_column",
    "columns",
    "critic_path",
    "data_files",
    "dataset_config",
    "dataset_eval_split",
    "dataset_name",
    "dataset_split",
    "eval_data_files",
    "extract",
    "lora_target_modules",
    "model_name_or_path",
    "model_revision",
    "optim_args",
    "output_dir",
    "project",
    "prompt_column",
    "prompt_template",
    "run_name",
    "stop",
    "system_prompt",
    "teacher_model_name_or_path",
    "teacher_model_revision",
    "teacher_model_server_url",
    "tracker_group",
    "tracker_tags",
    "vllm_python",
    "vllm_urls",
    "warm_start_data_files",
}
# Words that the schema cannot list, since modules, data or other settings decide which there are, and their tests.
DECIDED_ELSEWHERE = {
    "environment": "environments/test_episodes.py",
    "environment_factory": "environments/test_tool_functions.py",
    "lenient_reward": "rewards/test_reward_resolve.py",
    "metric_for_best_model": "configs/test_words.py",
    "name": "configs/test_words.py",
    "pass_reward": "configs/test_words.py",
    "strict_reward": "rewards/test_reward_resolve.py",
    "task": "prompts/test_prompt_bad_input.py",
    "tools": "environments/test_tool_functions.py",
}


def leaves() -> Iterator[tuple[str, Any]]:
    for field in Config.model_fields.values():
        assert field.annotation is not None
        for name, leaf in field.annotation.model_fields.items():  # type: ignore[attr-defined]
            yield name, leaf.annotation


def misspelt(word: str) -> str:
    return word + word[-1]


WORDS = {name: words_of(annotation) for name, annotation in leaves() if words_of(annotation)}
LISTS = {name for name, annotation in leaves() if "list" in str(annotation)}
CASES = [pytest.param(name, known[-1], id=name) for name, known in WORDS.items()]


def test_every_setting_that_holds_text_has_known_words_or_is_free_text() -> None:
    texts = {name for name, annotation in leaves() if "str" in str(annotation).replace("dict[str, typing.Any]", "")}
    assert texts - set(WORDS) == FREE_TEXT | set(DECIDED_ELSEWHERE)
    assert {"baseline", "surrogate", "loss_type", "engine", "dtype", "lr_scheduler_type", "report_to"} <= set(WORDS)


@pytest.mark.faults
@pytest.mark.parametrize("name, word", CASES)
def test_an_unknown_word_is_refused_with_its_field_and_the_nearest_word(name: str, word: str, tmp_path: Path) -> None:
    section, given = LEAVES[name], [misspelt(word)] if name in LISTS else misspelt(word)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({section: {name: given}}))
    config = Config()
    ways: list[Callable[[], Any]] = [
        lambda: load_config(file),
        lambda: load_config(None, [f"{name}={yaml.safe_dump(given, default_flow_style=True).splitlines()[0]}"]),
        lambda: check_values({name: given}),
        lambda: GRPOConfig(**{name: given}),
        lambda: type(getattr(config, section))(**{name: given}),
        lambda: setattr(getattr(config, section), name, given),
    ]
    for way in ways:
        with pytest.raises((ConfigError, ValidationError)) as error:
            way()
        assert name in str(error.value)
        assert f"Did you mean {word!r}?" in str(error.value)
    with pytest.raises((ConfigError, ValidationError), match=name):  # or: TRL's word cannot be set on a made config
        setattr(GRPOConfig(), name, given)
    assert getattr(getattr(config, section), name) == getattr(getattr(Config(), section), name)


@pytest.mark.faults
@pytest.mark.parametrize(
    "field, word",
    [pytest.param(n, words_of(a)[-1], id=n) for n, a in annotations_of(AlgorithmSpec).items() if words_of(a)],
)
def test_a_row_with_an_unknown_word_is_refused_where_it_is_made(field: str, word: str) -> None:
    change: Any = {field: misspelt(word)}
    for make in (
        lambda: AlgorithmSpec("mine", "me", **change),
        lambda: dataclasses.replace(ALGORITHMS["grpo"], **change),
        lambda: register_algorithm(name="mine", **change)(lambda rollouts: rollouts.reward_BT.sum(1)),
    ):
        with pytest.raises(ValueError, match=f"{field} cannot be '{misspelt(word)}'.*Did you mean '{word}'"):
            make()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"baseline": "group_meen", "surrogate": "clop", "loss_type": "dpao"}, "baseline.*Did you mean 'group_mean'"),
        ({"baseline": None}, "baseline cannot be None"),
        ({"epsilon": -0.2}, "epsilon cannot be -0.2; it must be above 0"),
        ({"beta": "0.1"}, "beta cannot be '0.1'; it must be a number"),
        ({"gamma": 1.5}, "gamma cannot be 1.5; it must be above 0 and at most 1"),
        ({"lam": float("nan")}, "lam cannot be nan"),
        ({"pass_k": 2.5}, "pass_k cannot be 2.5; it must be a whole number"),
        ({"use_bias_correction_kl": 1}, "use_bias_correction_kl cannot be 1; it must be True or False"),
        ({"advantage": "mine.py:f"}, "advantage cannot be 'mine.py:f'; it must be a function"),
        ({"baseline": "batch_mean", "baseline_per_step": True}, "compares the steps of a group"),
    ],
)
def test_a_row_refuses_numbers_outside_their_range_and_things_of_another_kind(change: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AlgorithmSpec("mine", "me", **change)


def test_a_row_refuses_every_number_that_the_config_refuses() -> None:
    for name, field in AlgorithmConfig.model_fields.items():
        if name not in annotations_of(AlgorithmSpec) or not any(
            kind in str(field.annotation) for kind in ("float", "int")
        ):
            continue
        for value in (-1.0, 0, 1, 1.5, 10**9, "x"):
            if name == "reward_coef" and value == 0:  # the row sees that there is no teacher either
                continue
            with_config, with_row = (refuses(make, {name: value}) for make in (AlgorithmConfig, mine))
            assert with_config == with_row, (name, value, field.annotation)


def mine(**changes: Any) -> AlgorithmSpec:
    return AlgorithmSpec("mine", "me", **changes)


def refuses(make: Callable[..., Any], values: dict[str, Any]) -> bool:
    try:
        make(**values)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: GRPOConfig(algorithm="dapo"), "dapo"),
        (lambda: GRPOConfig(name="dapo"), "dapo"),
        (lambda: GRPOConfig(algorithm="dapo", name="dapo"), "dapo"),
        (lambda: GRPOConfig(algorithm={"name": "dapo", "epsilon": 0.3}), "dapo"),
        (lambda: GRPOConfig(algorithm=AlgorithmConfig(name="dapo")), "dapo"),
        (lambda: GRPOConfig(algorithm={"epsilon": 0.3}), "grpo"),
        (lambda: renamed(GRPOConfig(), "algorithm"), "dapo"),
        (lambda: renamed(GRPOConfig(), "name"), "dapo"),
        (lambda: ActorCriticConfig(algorithm="a2c"), "a2c"),
        (lambda: ActorCriticConfig(name="a2c"), "a2c"),
        (lambda: ActorCriticConfig(), "ppo"),
        (lambda: RLOOConfig(algorithm="maxrl"), "maxrl"),
        (lambda: ReinforceConfig(algorithm="opo"), "opo"),
        (lambda: load_config(None, ["algorithm=dapo"]), "dapo"),
        (lambda: load_config(None, ["algorithm.name=dapo"]), "dapo"),
        (lambda: load_config(None, ["--name=dapo"]), "dapo"),
        (lambda: load_config(None, ["algorithm=gspo", "algorithm=dapo"]), "dapo"),
    ],
)
def test_the_algorithm_that_is_named_is_the_one_that_runs(make: Callable[[], Config], named: str) -> None:
    assert resolve_spec(make()).name == named


def renamed(config: Config, key: str) -> Config:
    setattr(config, key, "dapo")
    return config


@pytest.mark.parametrize("text", ["algorithm: dapo", "name: dapo", "algorithm:\n  name: dapo", "algorithm.name: dapo"])
def test_the_algorithm_that_a_file_names_is_the_one_that_runs(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert resolve_spec(load_config(file)).name == "dapo"
    assert resolve_spec(load_config(file, ["algorithm=gspo"])).name == "gspo"


@pytest.mark.parametrize(
    "make",
    [
        lambda: GRPOConfig(algorithm="dapo", name="gspo"),
        lambda: GRPOConfig(algorithm={"name": "dapo"}, name="gspo"),
        lambda: ActorCriticConfig(algorithm="a2c", name="ppo"),
        lambda: load_config(None, ["algorithm=dapo", "name=gspo"]),
        lambda: load_config(None, ["algorithm=dapo", "algorithm.name=gspo"]),
        lambda: load_config(None, ["seed=1", "run.seed=2"]),
        lambda: GRPOConfig(loss_type="sapo", surrogate="clip"),
        lambda: GRPOConfig(temperature=1.0, generation_kwargs={"temperature": 0.7}),
        lambda: GRPOConfig(use_vllm=True, engine="native"),
        lambda: GRPOConfig(warmup_steps=5, warmup_ratio=0.1),
        lambda: GRPOConfig(vllm_importance_sampling_cap=2.0, vllm_importance_sampling_clip_max=3.0),
    ],
)
def test_two_different_answers_are_refused(make: Callable[[], Config]) -> None:
    with pytest.raises(ConfigError, match=r"is given twice: .* and .*Leave one"):
        make()


@pytest.mark.parametrize(
    "text", ["seed: 1\nseed: 2", "run:\n  seed: 1\nrun:\n  run_name: x", "algorithm: dapo\nname: gspo"]
)
def test_a_file_that_says_two_things_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="is given twice"):
        load_config(file)


@pytest.mark.parametrize("stop", [[""], ["\n", ""], "", ("",)])
@pytest.mark.parametrize("name", ["stop", "vllm_urls", "report_to", "lora_target_modules", "data_files"])
def test_a_text_without_a_character_is_refused_by_name(name: str, stop: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}' cannot be .*"):
        check_values({name: stop})


def test_an_empty_system_prompt_is_a_prompt() -> None:
    assert check_values({"system_prompt": ""}).data.system_prompt == ""


def test_the_algorithm_and_the_metric_of_the_best_model_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"algorithm.name cannot be 'gropo'.*Did you mean 'grpo'"):
        GRPOConfig(algorithm="gropo")
    with pytest.raises(ConfigError, match=r"metric_for_best_model cannot be 'eval/gredy'.*Did you mean 'eval/greedy'"):
        check_values({"metric_for_best_model": "eval/gredy"})


def test_the_reward_that_decides_a_pass_is_refused_before_anything_is_sampled() -> None:
    config = check_values({"pass_reward": "exact_mach"})
    with pytest.raises(ConfigError, match=r"pass_reward cannot be 'exact_mach'.*Did you mean 'exact_match'"):
        make_scorer(config, ["exact_match", "length_penalty"], [{"answer": "a", "max_length": 4}])
    make_scorer(check_values({"pass_reward": "exact_match"}), ["exact_match"], [{"answer": "a"}])


ZEROS = torch.zeros(1, 1)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: importance_ratio(ZEROS, ZEROS, ZEROS == 0, "tokenn"), "importance_sampling_level 'tokenn'"),
        (lambda: sampler_correction(ZEROS, ZEROS, ZEROS == 0, "token_clip", None, None), "mode cannot be 'token_clip'"),
        (lambda: sampler_correction(ZEROS, ZEROS, ZEROS == 0, "row_mask", None, None), "mode cannot be 'row_mask'"),
        (lambda: Critic(None, kind="modell"), "critic_kind cannot be 'modell'.*Did you mean 'model'"),
        (lambda: Policy(None, params=SamplingParams(), pad_id=0, packing="pad"), "packing cannot be 'pad'"),
        (lambda: WorldSpec(rewards="gradedd"), "rewards cannot be 'gradedd'.*Did you mean 'graded'"),
        (lambda: Task("token", 16), "actions cannot be 'token'.*Did you mean 'tokens'"),
        (
            lambda: ControlSettings("cartpole", ALGORITHMS["ppo"], head="gausian"),
            "head cannot be 'gausian'.*'gaussian'",
        ),
        (
            lambda: ControlSettings("cartpole", ALGORITHMS["ppo"], optimizer="adamw"),
            "optimizer cannot be 'adamw'.*'adam'",
        ),
        (lambda: memory(Model(1e9, 1, 1, 1), PlannedJob(), 1, "fsdp"), "engine cannot be 'fsdp'.*Did you mean 'fsdp2'"),
    ],
)
def test_a_word_given_to_a_function_is_refused_too(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_ranks_share_the_batch_that_the_config_is_checked_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 completions in a pass on each of 2 ranks are 3 groups of 8; on one rank they are one and a half."""
    values = {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1, "num_generations": 8}
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_values(values)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ConfigError, match="12 completions, which does not divide by num_generations 8"):
        check_values(values)
