"""Several environments in one run: the column `environment` of a row chooses, as in TRL; tools that show pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_pg import GRPOTrainer
from llm_pg.config import ConfigError
from llm_pg.config.load import check_values
from llm_pg.environments.calls import ToolCall
from llm_pg.environments.rollout import EpisodeLimits
from llm_pg.environments.running import ToolRunner
from llm_pg.environments.toolbox import Toolbox
from llm_pg.metrics import Clock, read_metrics
from llm_pg.model.loading import character_tokenizer
from llm_pg.prompts import Prompt
from llm_pg.rewards import Scorer
from llm_pg.rewards.tally import RewardError
from llm_pg.rollout.episodes import ToolCollector
from llm_pg.run.tools import make_partner, with_own_tools
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.terminal import Terminal
from tests.environments.chats import TEMPLATE, Scripted, call, double
from tests.environments.pictures import photo


class Counter:
    """Counts."""

    def reset(self, **row: Any) -> None:
        self.row, self.total = row, 0

    def add(self, number: int) -> str:
        """Adds.

        Args:
            number: to add
        """
        self.total += number
        return str(self.total)

    def get_reward(self) -> float:
        return float(self.total)


class Speller:
    """Spells, and pays nothing itself."""

    def reset(self, word: str, **row: Any) -> str:
        self.row, self.word = row, word
        return f" It has {len(word)} letters."

    def letter(self, number: int) -> str:
        """Tells a letter.

        Args:
            number: its place
        """
        return self.word[number]


FACTORY = {"count": Counter, "again": Counter, "spell": Speller}


def spoken(environments: Any, completions: Any) -> list[float | None]:
    """Pays the speller's episodes alone."""
    return [10.0 if isinstance(each, Speller) else None for each in environments]


@pytest.fixture
def chat() -> Any:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def prompts_of(names: list[str]) -> list[Prompt]:
    messages = [[{"role": "user", "content": f"{place}?"}] for place in range(len(names))]
    rows = [{"environment": name, "word": "abc", "prompt": asked} for name, asked in zip(names, messages, strict=True)]
    return [Prompt(7 + i, "", asked, (), row) for i, (asked, row) in enumerate(zip(messages, rows, strict=True))]


def rendered(tokenizer: Any, content: str, schemas: Any) -> tuple[int, ...]:
    asked = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(asked, tools=schemas, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_each_row_is_played_by_the_environment_that_it_names_with_its_tools_alone(chat: Any) -> None:
    config = check_values({"reward_workers": 1})
    toolbox = Toolbox([double], FACTORY)
    of_count, of_spell = (toolbox.schemas_of(name) for name in ("count", "spell"))
    assert [schema["function"]["name"] for schema in of_count] == ["double", "add"]
    assert [schema["function"]["name"] for schema in of_spell] == ["double", "letter"]
    prompts = with_own_tools(config, toolbox, prompts_of(["count", "spell", "again", "count"]), chat)
    assert [prompt.index for prompt in prompts] == [7, 8, 9, 10]
    assert prompts[0].ids == rendered(chat, "0?", of_count)
    assert prompts[1].ids == rendered(chat, "1?", of_spell)
    engine = Scripted(
        chat,
        [
            [call("add", number=2), call("add", number=3), "done"],
            [call("letter", number=2), call("add", number=1), "done"],
            [call("letter", number=0), "done"],
            [call("double", number=4), "done"],
        ],
    )
    collector = ToolCollector(
        engine,
        Scorer([spoken, *toolbox.rewards], in_process=True),
        chat,
        SamplingParams(max_completion_length=400),
        seed=0,
        gamma=1.0,
        partner=make_partner(config, toolbox, chat, [chat.eos_token_id]),
        limits=EpisodeLimits(4, 400),
    )
    with collector:
        experience = collector.collect(prompts, 1, 1, Clock())
    assert engine.prompts[0][1] == rendered(chat, "1? It has 3 letters.", of_spell)
    assert experience.scores.parts == {"spoken": [None, 10.0, None, None], "Counter": [5.0, None, 0.0, 0.0]}
    assert experience.scores.reward == [5.0, 10.0, 0.0, 0.0]
    said = experience.texts
    assert "[double] 8" in said[3]
    assert "[letter] c" in said[1]
    assert "Tool add not found. There are: double, letter." in said[1]
    assert "Tool letter not found. There are: double, add." in said[2]
    played = [each for environments in toolbox.environments.values() for each in environments.free]
    assert all("environment" not in each.row and "prompt" in each.row for each in played)


@pytest.mark.parametrize(
    "row, words", [({}, "'environment' of a row is missing"), ({"environment": "spel"}, "Did you mean 'spell'")]
)
def test_a_row_that_names_no_environment_is_refused(row: dict[str, Any], words: str, chat: Any) -> None:
    prompt = Prompt(0, "", [{"role": "user", "content": "?"}], (), row)
    with pytest.raises(ConfigError, match=words):
        with_own_tools(check_values({}), Toolbox([], FACTORY), [prompt], chat)


def test_two_environments_may_have_tools_of_one_name_but_no_episode_has_two(chat: Any) -> None:
    assert list(Toolbox([], {"a": Counter, "b": Counter}).tools) == ["add"]

    def add(number: int) -> int:
        """Adds.

        Args:
            number: to add
        """
        return number

    with pytest.raises(ConfigError, match="Two tools are called 'add'"):
        Toolbox([add], {"a": Speller, "b": Counter})


def test_a_run_mixes_environments_that_are_given_as_a_dict(
    chat: Any, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    asked = [[{"role": "user", "content": f"{number}?"}] for number in range(8)]
    trainer = GRPOTrainer(
        model=make_model("llama", max_position_embeddings=512),
        reward_funcs=spoken,
        args=check_values({
            "name": "grpo", "output_dir": str(tmp_path), "run_name": "r", "max_steps": 2, "prompts_per_step": 4,
            "num_generations": 2, "max_completion_length": 8, "num_eval_prompts": 2, "eval_num_samples": 0,
            "use_cpu": True, "reward_workers": 1,
        }),
        train_dataset=[
            {"prompt": asked[i], "environment": ("count", "spell")[i % 2], "word": "ab"} for i in range(8)
        ],
        processing_class=chat,
        environment_factory={"count": Counter, "spell": lambda: Speller()},
        terminal=Terminal(quiet=True),
    )  # fmt: skip
    shown = {prompt.row["environment"]: prompt.text.splitlines()[0] for prompt in trainer.train_prompts}
    assert shown == {"count": "add;", "spell": "letter;"}
    trainer.train()
    lines = read_metrics(tmp_path / "r" / "metrics.jsonl")
    assert len(lines) == 2
    assert all(line["unscorable"] == 0 for line in lines)
    assert trainer.config.rollout.environment_factory == {"count": f"{__name__}:Counter", "spell": "<lambda>"}


@pytest.mark.parametrize("in_process", [True, False])
def test_a_picture_stops_the_run_by_name_and_blocks_of_text_are_their_text(in_process: bool) -> None:
    toolbox = Toolbox([photo])
    with ToolRunner(toolbox.tools, workers=1, in_process=in_process) as runner:
        texts = runner.run([ToolCall("photo", {"name": name}) for name in ("text", "list")], [None] * 2)
        assert [result.text for result in texts] == ["one\ntwo", "['one', 2]"]
        for name in ("alone", "block"):
            with pytest.raises(RewardError, match="The tool photo answered with a picture"):
                runner.run([ToolCall("photo", {"name": name})], [None])
