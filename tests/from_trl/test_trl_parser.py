"""Scripts that parse their command line into TRL's classes, and configs that are dataclasses."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from trl import ModelConfig, ScriptArguments, get_peft_config

from llm_pg import GRPOConfig, RLOOConfig, TrlParser
from llm_pg.config import Config, ConfigError


@dataclass
class Mine(GRPOConfig):
    """A config with fields of a script's own, as open-r1 writes one."""

    benchmarks: list[str] = field(default_factory=list, metadata={"help": "To run afterwards."})
    system_prompt: str | None = field(default=None, metadata={"help": "Of the script, not the setting of that name."})
    rounds: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rounds += 1


def test_what_is_given_becomes_a_setting_and_what_is_left_out_keeps_our_default() -> None:
    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig))
    words = ["--learning_rate", "1e-5", "--loss_type", "dr_grpo", "--bf16", "true", "--use_peft", "--lora_r", "8"]
    ours = ["--prompts_per_step", "3", "--dataset_name", "org/data"]
    script, args, model = parser.parse_args_and_config([*words, *ours])
    given = {"learning_rate": 1e-5, "loss_type": "dr_grpo", "bf16": True, "prompts_per_step": 3}
    assert args.model_dump() == GRPOConfig(**given).model_dump()
    assert (script.dataset_name, model.lora_r, get_peft_config(model).r) == ("org/data", 8, 8)
    assert args.data.dataset_name is None  # the script loads it


def test_a_yaml_file_is_read_and_the_command_line_counts_for_more(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "learning_rate: 1.0e-05\nnum_generations: 4\nbenchmarks: [math]\nscale_rewards: false\nbeta: 0.01\n"
    )
    (args,) = TrlParser(Mine).parse_args_and_config(["--config", str(file), "--num_generations", "2"])
    assert (args.learning_rate, args.num_generations, args.scale_rewards) == (1e-5, 2, "none")
    assert (args.benchmarks, args.rounds, type(args)) == (["math"], 4, Mine)


def test_a_bad_value_and_an_unknown_option_are_refused() -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        TrlParser(GRPOConfig).parse_args_and_config(["--learning_rate", "-1"])
    with pytest.raises(ValueError, match="reward_momentum"):
        TrlParser(GRPOConfig).parse_args_and_config(["--reward_momentum", "1"])


def test_a_dataclass_derives_from_a_config_and_its_fields_are_no_settings_of_a_run(tmp_path: Path) -> None:
    args = Mine(str(tmp_path), benchmarks=["gsm8k"], system_prompt="Think.", learning_rate=1e-4)
    assert (args.benchmarks, args.system_prompt, args.rounds, args.learning_rate) == (["gsm8k"], "Think.", 4, 1e-4)
    assert args.data.system_prompt is None
    assert set(args.model_dump()) == set(Config.model_fields)
    assert args.model_copy(deep=True).benchmarks == ["gsm8k"]
    assert Mine().benchmarks == []


@pytest.mark.parametrize("config", [GRPOConfig, RLOOConfig, Mine])
def test_a_config_is_read_as_a_dataclass(config: type[GRPOConfig]) -> None:
    args = config("out", learning_rate=1e-4, num_train_epochs=2)
    assert dataclasses.is_dataclass(args)
    values = dataclasses.asdict(args)
    assert (values["output_dir"], values["learning_rate"], values["num_train_epochs"]) == ("out", 1e-4, 2)
    assert values == {name: value for name, value in args.to_dict().items() if name in values}
    assert ("benchmarks" in values) is (config is Mine)


def test_tokens_are_not_in_the_dict_of_the_settings() -> None:
    assert GRPOConfig(hub_token=None).to_dict()["hub_token"] is None
