"""Every argument of TRL 1.16 has its line in our table, and each line does what it says."""

import dataclasses
import inspect
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from from_trl_page import counts, markdown

from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.config import Config, ConfigError, GRPOConfig, RLOOConfig
from llm_pg.config.check import plan_batch, resolve_spec
from llm_pg.config.flat import FlatConfig
from llm_pg.config.schema import LEAVES
from llm_pg.config.trl import TRAINER, WORDS
from llm_pg.from_trl.checks import check_trainer_arguments

ROOT = Path(__file__).resolve().parents[2]
GENERATORS = ROOT / "docs" / "generators"
REFUSED = [name for name, word in WORDS.items() if word.kind == "refused"]
IDLE = [name for name, word in WORDS.items() if word.kind == "idle"]
SUPPORTED = [name for name, word in WORDS.items() if word.kind == "supported"]


def fields(config: Any) -> dict[str, Any]:
    """Name and default of each field of a dataclass; an enum's member as its value."""
    out = {}
    for field in dataclasses.fields(config):
        made = field.default_factory is not dataclasses.MISSING
        value = field.default_factory() if made else field.default  # type: ignore[misc]
        out[field.name] = value.value if isinstance(value, Enum) else value
    return out


@pytest.fixture(scope="module")
def theirs() -> Any:
    return pytest.importorskip("trl")


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_the_table_has_every_argument_of_the_installed_trl_with_its_default(theirs: Any, algorithm: str) -> None:
    """Where this fails TRL has changed: give the argument a line in llm_pg/config/trl/ and write the page again."""
    config = theirs.GRPOConfig if algorithm == "grpo" else theirs.RLOOConfig
    for name, default in fields(config).items():
        assert name in WORDS, f"TRL has an argument {name!r} that the table does not know"
        word = WORDS[name]
        ours = word.rloo if algorithm == "rloo" and word.rloo is not ... else word.default
        assert (ours, type(ours)) == (default, type(default)), name


def test_the_table_has_no_argument_that_trl_does_not_have(theirs: Any) -> None:
    assert set(WORDS) == set(fields(theirs.GRPOConfig)) | set(fields(theirs.RLOOConfig))


@pytest.mark.parametrize("trainer", ["GRPOTrainer", "RLOOTrainer"])
def test_the_table_has_every_argument_of_the_trainers(theirs: Any, trainer: str) -> None:
    parameters = set(inspect.signature(getattr(theirs, trainer).__init__).parameters) - {"self"}
    assert parameters <= set(TRAINER)
    if trainer == "GRPOTrainer":
        assert parameters == set(TRAINER)


def test_an_argument_that_a_later_trl_adds_is_missed_by_the_table() -> None:
    later = dataclasses.make_dataclass("Later", [("learning_rate", float, 1e-6), ("reward_momentum", float, 0.0)])
    assert [name for name in fields(later) if name not in WORDS] == ["reward_momentum"]


def test_the_page_is_made_from_the_table() -> None:
    """Where this fails: python docs/generators/from_trl_page.py docs/from-trl.md"""
    assert (ROOT / "docs" / "from-trl.md").read_text(encoding="utf-8") == markdown()


def test_the_page_has_a_row_of_five_cells_for_every_argument() -> None:
    tables = markdown().partition("## The batch and the length")[2]
    rows = [line for line in tables.splitlines() if line.startswith("| `")]
    assert all(row.replace("\\|", "").count("|") == 6 for row in rows)
    assert {row.split("`")[1] for row in rows} == {*WORDS, *TRAINER}
    assert f"{len(WORDS)} arguments of the configs" in counts()


def test_the_page_is_written_without_torch_and_without_trl(tmp_path: Path) -> None:
    code = "import sys, from_trl_page; sys.exit(bool({'torch', 'trl', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=GENERATORS).returncode == 0
    command = [sys.executable, str(GENERATORS / "from_trl_page.py"), str(tmp_path / "page.md")]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == markdown()


def other(value: Any) -> Any:
    """A value of about the same kind that asks for something."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, (int, float)) else "something"


@pytest.mark.parametrize("config", [GRPOConfig, RLOOConfig])
@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_argument_is_one_paragraph_that_says_what_to_do(config: type[FlatConfig], name: str) -> None:
    value = other(WORDS[name].default)
    with pytest.raises(ConfigError) as error:
        config("runs", **{name: value})
    text = str(error.value)
    assert name in text
    assert repr(value) in text
    assert WORDS[name].note in text
    assert "\n" not in text
    assert len(WORDS[name].note) > 20


@pytest.mark.parametrize("name", REFUSED)
def test_trls_default_of_a_refused_argument_changes_nothing(name: str) -> None:
    given = GRPOConfig("runs", **{name: WORDS[name].default})
    assert given.model_dump() == GRPOConfig("runs").model_dump()
    assert getattr(given, name) == WORDS[name].default


@pytest.mark.parametrize("name", IDLE)
def test_an_idle_argument_changes_nothing_and_is_read_as_it_was_given(name: str) -> None:
    value = other(WORDS[name].default)
    given = GRPOConfig("runs", **{name: value})
    assert given.model_dump() == GRPOConfig("runs").model_dump()
    assert getattr(given, name) == value


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_supported_argument_is_a_setting_of_the_same_name(name: str) -> None:
    value = WORDS[name].default
    assert name in LEAVES
    given = GRPOConfig(**{name: value})  # a None that says nothing leaves the default
    if value is not None:
        assert getattr(given, name) == value


def test_the_same_arguments_that_trl_takes_by_default_are_all_taken_together() -> None:
    GRPOConfig(**{name: word.default for name, word in WORDS.items() if name != "normalize_advantages"})


def test_an_unknown_name_gets_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"num_generation'.*Did you mean 'num_generations'"):
        GRPOConfig(num_generation=4)


def rows(config: Config) -> int:
    return plan_batch(config).rows


@pytest.mark.parametrize(
    "given, completions, updates",
    [
        # per_device_train_batch_size × steps_per_generation completions, in optimiser steps of accumulation passes
        ({"per_device_train_batch_size": 16}, 16, 1),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}, 16, 1),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 16}, 32, 4),
        ({"gradient_accumulation_steps": 2}, 16, 1),
        ({"per_device_train_batch_size": 4, "generation_batch_size": 32}, 32, 8),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "generation_batch_size": 32}, 32, 2),
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "steps_per_generation": 2}, 32, 1),
    ],
)
def test_a_batch_and_its_updates_are_those_that_trl_computes(
    given: dict[str, Any], completions: int, updates: int, theirs: Any, tmp_path: Path
) -> None:
    config = GRPOConfig("runs", **given)
    assert (rows(config), config.algorithm.steps_per_generation) == (completions, updates)
    peer = theirs.GRPOConfig(str(tmp_path), bf16=False, use_cpu=True, **given)
    step = peer.per_device_train_batch_size * peer.gradient_accumulation_steps
    assert plan_batch(config).minibatch_rows == step
    assert rows(config) == max(peer.generation_batch_size, step)


def test_generation_batch_size_is_that_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = GRPOConfig(per_device_train_batch_size=8, generation_batch_size=32)
    assert plan_batch(config, num_ranks=2).rows == 32


@pytest.mark.parametrize(
    "given, words",
    [
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 6}, "straddle two batches"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 3}, "parts of several batches"),
        ({"generation_batch_size": 12}, "multiple of 8"),
        ({"generation_batch_size": 16, "steps_per_generation": 2}, "give one of them"),
        ({"generation_batch_size": 16, "prompts_per_step": 2}, "give one of them"),
        ({"per_device_train_batch_size": 4}, "whole groups"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "weighs whole completions by itself"),
        ({"save_strategy": "best"}, "metric_for_best_model"),
        ({"eval_strategy": "sometimes"}, "no, steps, epoch"),
        ({"model_init_kwargs": {"device_map": "auto"}}, "load the model yourself"),
        ({"model_init_kwargs": "{"}, "no JSON"),
        ({"generation_kwargs": {"num_beams": 4}}, "what is sampled must be what is trained"),
        ({"vllm_mode": "remote"}, "server, colocate"),
        ({"vllm_importance_sampling_clip_max": None}, "large number"),
    ],
)
def test_a_value_that_cannot_be_had_is_an_error_that_says_why(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GRPOConfig("runs", **given)


def test_steps_are_optimiser_steps_where_a_batch_makes_several() -> None:
    counts = {"max_steps": 101, "save_steps": 50, "logging_steps": 4, "eval_steps": 20, "warmup_steps": 10}
    config = GRPOConfig(num_iterations=2, gradient_accumulation_steps=2, steps_per_generation=4, **counts)
    assert config.algorithm.steps_per_generation == 2  # updates of a pass, and two passes: four of a batch
    assert [getattr(config, name) for name in counts] == [26, 13, 1, 5, 3]
    own = GRPOConfig(num_iterations=2, prompts_per_step=4, steps_per_generation=2, **counts)
    assert [getattr(own, name) for name in counts] == list(counts.values())


def test_epochs_and_shares_are_counted_when_the_number_of_prompts_is_known() -> None:
    config = GRPOConfig(num_train_epochs=2.5, save_strategy="epoch", eval_steps=0.2, warmup_steps=0.05, max_steps=-1)
    config.settle(num_prompts=43, prompts_per_step=4)
    assert (config.max_steps, config.save_steps, config.eval_steps, config.warmup_steps) == (25, 10, 5, 2)
    config = GRPOConfig(num_train_epochs=2, max_steps=7, warmup_ratio=0.5)
    config.settle(num_prompts=43, prompts_per_step=4)
    assert (config.max_steps, config.warmup_steps) == (7, 4)


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"loss_type": "sapo"}, {"surrogate": "sapo", "loss_type": "grpo"}),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, {"surrogate": "cispo", "loss_type": "dapo"}),
        ({"loss_type": "cispo"}, {"surrogate": "cispo", "epsilon_high": 0.2}),
        ({"loss_type": "cispo", "epsilon": 5.0}, {"surrogate": "cispo", "epsilon_high": 5.0}),
        ({"scale_rewards": True}, {"scale_rewards": "group"}),
        ({"scale_rewards": False}, {"scale_rewards": "none"}),
        ({"scale_rewards": "batch"}, {"scale_rewards": "batch"}),
        ({"normalize_advantages": True}, {"normalize_advantages": "rollouts"}),
        ({"mask_truncated_completions": True}, {"truncated": "mask"}),
        ({"vllm_importance_sampling_cap": 2.0}, {"vllm_importance_sampling_clip_max": 2.0}),
    ],
)
def test_words_of_the_objective_become_those_of_the_row(given: dict[str, Any], expected: dict[str, Any]) -> None:
    row = resolve_spec(GRPOConfig(**given))
    assert {name: getattr(row, name) for name in expected} == expected


@pytest.mark.parametrize(
    "row, given",
    [
        ("dapo", {"loss_type": "dapo", "epsilon_high": 0.28}),
        ("dr_grpo", {"loss_type": "dr_grpo", "scale_rewards": False}),
        ("sapo", {"loss_type": "sapo"}),
        ("luspo", {"loss_type": "luspo", "importance_sampling_level": "sequence"}),
        ("vespo", {"loss_type": "vespo", "importance_sampling_level": "token"}),
        ("cispo", {"loss_type": "cispo", "epsilon_high": 5.0}),
        (
            "gspo",
            {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 3e-4, "epsilon_high": 4e-4},
        ),
    ],
)
def test_the_settings_of_a_relative_as_trl_writes_them_are_its_row(row: str, given: dict[str, Any]) -> None:
    """The rows' losses and gradients are compared with TRL's in tests/peers/test_trl_parity.py."""
    named = {"name": row, "source": ALGORITHMS[row].source}
    assert dataclasses.replace(resolve_spec(GRPOConfig(**given)), **named) == ALGORITHMS[row]


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"use_vllm": True}, {"engine": "vllm", "vllm_mode": "colocate", "vllm_urls": []}),
        ({"use_vllm": True, "vllm_enable_sleep_mode": True}, {"vllm_enable_sleep_mode": True}),
        ({"use_vllm": True, "vllm_python": "/v/python"}, {"vllm_mode": "server", "vllm_python": "/v/python"}),
        ({"engine": "vllm"}, {"vllm_mode": "server", "vllm_urls": []}),
        ({"engine": "vllm", "vllm_mode": "server"}, {"vllm_mode": "server", "vllm_urls": []}),
        ({"use_vllm": True, "vllm_mode": "server"}, {"vllm_urls": ["http://127.0.0.1:8000"]}),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_server_host": "gpu7", "vllm_server_port": 9000},
            {"vllm_urls": ["http://gpu7:9000"]},
        ),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://a:1"},
            {"vllm_urls": ["http://a:1"]},
        ),
        ({"vllm_model_impl": "transformers"}, {"vllm_options": {"model-impl": "transformers"}}),
        ({"report_to": "none"}, {"report_to": []}),
        ({"report_to": "wandb"}, {"report_to": ["wandb"]}),
        ({"log_completions": True}, {"log_completions": 8}),
        ({"log_completions": False}, {"log_completions": 0}),
        ({"log_completions": 3}, {"log_completions": 3}),
        ({"eval_strategy": "no"}, {"num_eval_prompts": 0, "eval_steps": 0, "eval_on_start": False}),
        ({"eval_strategy": "steps", "logging_steps": 7}, {"eval_steps": 7}),
        ({"save_strategy": "steps"}, {"save_steps": 500}),
        ({"save_strategy": "no"}, {"save_steps": 0}),
        ({"num_generations_eval": 2, "per_device_eval_batch_size": 16}, {"eval_num_samples": 2, "eval_batch_size": 16}),
        (
            {"model_init_kwargs": {"torch_dtype": "bfloat16", "attn_implementation": "sdpa", "revision": "main"}},
            {"dtype": "bfloat16", "attn_implementation": "sdpa", "model_revision": "main"},
        ),
        ({"generation_kwargs": {"num_beams": 1, "length_penalty": -0.1, "top_k": 5}}, {"top_k": 5}),
        ({"generation_kwargs": {"stop_strings": "END", "min_p": 0.1}}, {"stop": ["END"], "min_p": 0.1}),
        ({"chat_template_kwargs": '{"enable_thinking": false}'}, {"chat_template_kwargs": {"enable_thinking": False}}),
        ({"activation_checkpointing": True}, {"gradient_checkpointing": True}),
        (
            {"bf16": None, "min_p": None, "save_total_limit": None},
            {"bf16": False, "min_p": 0.0, "save_total_limit": None},
        ),
    ],
)
def test_a_mapped_argument_becomes_these_settings(given: dict[str, Any], expected: dict[str, Any]) -> None:
    config = GRPOConfig("runs", **given)
    assert {name: getattr(config, name) for name in expected} == expected


def test_enums_and_types_of_the_libraries_are_read() -> None:
    import torch
    from transformers.trainer_utils import IntervalStrategy, SchedulerType

    config = GRPOConfig(
        lr_scheduler_type=SchedulerType.COSINE,
        save_strategy=IntervalStrategy.NO,
        model_init_kwargs={"dtype": torch.bfloat16},
    )
    assert (config.lr_scheduler_type, config.save_steps, config.dtype) == ("cosine", 0, "bfloat16")


def test_a_setting_of_a_made_config_is_set_and_checked() -> None:
    config = GRPOConfig("runs")
    config.learning_rate = 1e-4
    assert (config.learning_rate, config.train.learning_rate) == (1e-4, 1e-4)
    with pytest.raises(ValueError, match="greater than 0"):
        config.learning_rate = -1.0
    with pytest.raises(ValueError, match="no attribute 'learning_rat'"):
        config.learning_rat = 1.0


def test_an_argument_set_on_a_made_config_is_as_if_it_had_been_given() -> None:
    config = GRPOConfig("runs", num_iterations=2)
    config.learning_rate = 1e-4
    config.max_steps = 10  # optimiser steps, two of which are a batch
    config.scale_rewards = False
    config.model_init_kwargs = {"torch_dtype": "bfloat16", "revision": "r", "device_map": None, "use_cache": False}
    whole = GRPOConfig(
        "runs", num_iterations=2, max_steps=10, scale_rewards=False, dtype="bfloat16", learning_rate=1e-4
    )
    whole.model.model_revision = "r"
    assert config.model_dump() == whole.model_dump()
    assert config.model_init_kwargs["device_map"] is None
    with pytest.raises(ConfigError, match="load the model yourself"):
        config.model_init_kwargs = {"device_map": "auto"}


@pytest.mark.parametrize("name", [name for name, word in TRAINER.items() if word.kind == "refused"])
def test_an_argument_of_the_trainer_that_is_refused_says_what_to_do(name: str) -> None:
    check_trainer_arguments({name: TRAINER[name].default})
    with pytest.raises(ConfigError, match=f"TRL's argument {name}=.* is refused: "):
        check_trainer_arguments({name: [object()]})


def test_an_unknown_argument_of_the_trainer_gets_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"no argument 'peft_conf'.*Did you mean 'peft_config'"):
        check_trainer_arguments({"peft_conf": None})


def test_a_reference_that_is_synced_has_trls_weight_with_rloo_where_none_is_given() -> None:
    import trl

    assert RLOOConfig(sync_ref_model=True).beta == trl.RLOOConfig(use_cpu=True, bf16=False).beta == 0.05
    assert RLOOConfig(sync_ref_model=True, beta=0.2).beta == 0.2
    assert RLOOConfig().beta == 0.0
