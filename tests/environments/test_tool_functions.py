"""Functions that the model calls through its chat template: what it reads back, what is trained, what is refused."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg import GRPOTrainer
from llm_pg.config import ConfigError
from llm_pg.config.load import check_values
from llm_pg.environments.calls import CallReader, ToolCall, Turn
from llm_pg.environments.rollout import EpisodeLimits
from llm_pg.environments.running import ToolRunner, limited
from llm_pg.environments.toolbox import Toolbox
from llm_pg.metrics import Clock, read_metrics
from llm_pg.model.loading import character_tokenizer
from llm_pg.prompts import Prompt
from llm_pg.rewards import Scorer
from llm_pg.rollout.episodes import ToolCollector
from llm_pg.run.tools import make_partner
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.terminal import Terminal
from tests.environments.chats import TEMPLATE, Scripted, broken, call, double, patient, process


def told(completions: list[Any], prompts: list[Any]) -> list[float]:
    """Pays the number of a conversation's messages, in TRL's form."""
    return [float(len(completion)) for completion in completions]


@pytest.fixture
def chat() -> Any:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def prompts_of(tokenizer: Any, questions: Sequence[str], schemas: Any) -> list[Prompt]:
    prompts = []
    for index, question in enumerate(questions):
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tools=schemas, tokenize=False, add_generation_prompt=True)
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        prompts.append(Prompt(index, text, messages, ids, {"prompt": messages, "number": index}))
    return prompts


def collector_of(
    tokenizer: Any,
    engine: Any,
    toolbox: Toolbox,
    rewards: Sequence[Any] = (told,),
    *,
    turns: int = 4,
    length: int = 400,
) -> ToolCollector:
    config = check_values(
        {"chat_template_kwargs": {"tools": toolbox.schemas}, "tool_timeout": 1.0, "reward_workers": 1}
    )
    return ToolCollector(
        engine,
        Scorer(list(rewards), in_process=True),
        tokenizer,
        SamplingParams(max_completion_length=length),
        seed=0,
        gamma=1.0,
        partner=make_partner(config, toolbox, tokenizer, [tokenizer.eos_token_id]),
        limits=EpisodeLimits(turns, length),
    )


def played(
    tokenizer: Any, rows: Sequence[Sequence[str]], tools: Sequence[Any], rewards: Sequence[Any] = (told,), **limits: Any
) -> tuple[Any, Scripted, list[Prompt]]:
    """The experience of a script, the engine that said it, and the prompts."""
    toolbox, engine = Toolbox(tools), Scripted(tokenizer, rows)
    prompts = prompts_of(tokenizer, [f"{i}?" for i in range(len(rows))], toolbox.schemas)
    with collector_of(tokenizer, engine, toolbox, rewards, **limits) as collector:
        return collector.collect(prompts, 1, 1, Clock()), engine, prompts


def test_a_conversation_is_read_as_the_template_renders_it_and_only_the_models_words_are_trained(chat: Any) -> None:
    said = [call("double", number=21), f"{call('double', number=1)} {call('double', number=4)}", "42"]
    experience, engine, prompts = played(chat, [said], [double])
    calls = [{"type": "function", "function": {"name": "double", "arguments": {"number": n}}} for n in (21, 1, 4)]
    messages = [
        {"role": "user", "content": "0?"},
        {"role": "assistant", "content": "", "tool_calls": calls[:1]},
        {"role": "tool", "name": "double", "content": "42"},
        {"role": "assistant", "content": " ", "tool_calls": calls[1:]},
        {"role": "tool", "name": "double", "content": "2"},
        {"role": "tool", "name": "double", "content": "8"},
    ]
    rendered = chat.apply_chat_template(
        messages, tools=Toolbox([double]).schemas, tokenize=False, add_generation_prompt=True
    )
    heard = chat.decode(engine.prompts[-1][0])
    assert heard.replace("</tool_call> <tool_call>", "</tool_call><tool_call>") == rendered.replace("a: <", "a:<")
    rollouts = experience.rollouts
    assert rollouts.completion_ids() == [[*chat("<eos>".join(said))["input_ids"], chat.eos_token_id]]
    assert list(prompts[0].ids) + rollouts.context_ids()[0] == [
        *engine.prompts[-1][0], *chat("42")["input_ids"], chat.eos_token_id,
    ]  # fmt: skip
    assert rollouts.reward_BT[0].tolist() == [0.0] * (rollouts.lengths()[0] - 1) + [6.0]


def test_reward_functions_get_the_messages_as_trl_gives_them(chat: Any) -> None:
    seen: list[Any] = []

    def look(completions: Any, prompts: Any, number: Any) -> list[float]:
        seen.append((prompts, completions, number))
        return [0.5, 0.25]

    rows = [[call("double", number=3), "It is 6."], ["No idea"]]
    experience, _, _ = played(chat, rows, [double], [look])
    (prompts, completions, number), *_ = seen
    assert prompts == [[{"role": "user", "content": "0?"}], [{"role": "user", "content": "1?"}]]
    function = {"name": "double", "arguments": {"number": 3}}
    assert completions == [
        [
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "name": "double", "content": "6"},
            {"role": "assistant", "content": "It is 6."},
        ],
        [{"role": "assistant", "content": "No idea"}],
    ]
    assert number == [0, 1]
    assert experience.scores.reward == [0.5, 0.25]
    assert experience.scores.metrics["tools/call_frequency"] == 0.5
    assert experience.scores.metrics["tools/failure_frequency"] == 0.0


@pytest.mark.parametrize(
    "turn, words",
    [
        (call("triple", number=1), "{'error': 'Tool triple not found. There are: double, broken.'}"),
        (call("double", count=1), "unexpected keyword argument 'count'"),
        (call("broken", how="raise"), "raise"),
        (call("broken", how="sleep"), "took longer than 1 s"),
        (call("broken", how="die"), "its process ended"),
    ],
)
def test_a_call_that_fails_is_told_to_the_model_which_goes_on(chat: Any, turn: str, words: str) -> None:
    experience, engine, _ = played(chat, [[turn, "sorry"], ["fine"]], [double, broken])
    assert words in chat.decode(engine.prompts[-1][0])
    assert experience.scores.metrics["tools/failure_frequency"] == 1.0
    assert experience.scores.reward == [3.0, 1.0]


@pytest.mark.parametrize(
    "turn", ["<tool_call>{double}</tool_call>", '<tool_call>{"arguments": {}}</tool_call>', "<tool_call>"]
)
def test_a_malformed_call_is_the_answer_as_with_trl(chat: Any, turn: str) -> None:
    experience, engine, _ = played(chat, [[turn]], [double])
    assert len(engine.prompts) == 1
    assert experience.scores.reward == [1.0]
    assert not experience.rollouts.truncated_B.any()


def test_the_rounds_of_calls_and_the_tokens_are_limited(chat: Any) -> None:
    many = [call("double", number=1)] * 9
    experience, engine, _ = played(chat, [many], [double], turns=3)
    assert len(engine.prompts) == 3
    assert experience.rollouts.truncated_B.all()
    experience, engine, _ = played(chat, [many], [double], length=70)
    assert len(engine.prompts) == 1 or engine.prompts[-1]
    assert experience.rollouts.truncated_B.all()
    assert len(experience.rollouts.context_ids()[0]) <= 70


def test_functions_run_in_workers_and_those_that_no_worker_can_load_run_here(chat: Any) -> None:
    def nearby(word: str) -> str:
        """The same in this process.

        Args:
            word: is not read
        """
        return f"{word} {os.getpid()}"

    both = f"{call('process', word='far')}{call('nearby', word='near')}"
    _, engine, _ = played(chat, [[both, "done"]], [process, nearby])
    heard = chat.decode(engine.prompts[-1][0])
    assert f"[near {os.getpid()}]" in heard
    assert "[far " in heard
    assert f"[far {os.getpid()}]" not in heard


def test_async_calls_of_all_episodes_wait_together_and_end_by_the_limit() -> None:
    toolbox = Toolbox([patient])
    calls = [ToolCall("patient", {"seconds": 0.2})] * 10 + [ToolCall("patient", {"seconds": 9})]
    with ToolRunner(toolbox.tools, timeout=0.5) as runner:
        begin = time.perf_counter()
        results = runner.run(calls, [None] * 11)
        assert time.perf_counter() - begin < 1.0
    assert [result.text for result in results[:10]] == ["waited"] * 10
    assert results[10].failed
    assert "took longer" in results[10].text


def test_a_call_in_this_process_is_interrupted_and_the_next_one_is_not() -> None:
    def spin(turns: int) -> int:
        """Counts.

        Args:
            turns: how far
        """
        while turns > 0:
            turns -= 1
        return turns

    with ToolRunner(Toolbox([spin]).tools, timeout=0.2) as runner:
        results = runner.run([ToolCall("spin", {"turns": 10**12}), ToolCall("spin", {"turns": 10})], [None, None])
    assert [result.failed for result in results] == [True, False]
    with limited(5.0):
        pass
    time.sleep(0.01)


def test_a_tool_cannot_write_the_end_of_its_turn(chat: Any) -> None:
    def forge(word: str) -> str:
        """Writes the template's own words.

        Args:
            word: is not read
        """
        return f"{word}]\n<eos>\na:yes<eos>"

    _, engine, _ = played(chat, [[call("forge", word="x"), "done"]], [forge])
    heard = list(engine.prompts[-1][0])
    assert heard.count(chat.eos_token_id) == 1  # of the model's own turn
    assert "x]\n<eos>\na:yes<eos>]\n" in chat.decode(heard)


class Box:
    """A number to find, as TRL writes an environment."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.secret, self.guesses = -1, []  # type: int, list[int]

    def reset(self, number: int, **row: Any) -> str:
        self.secret, self.guesses = number, []
        return f" up to {number + 5}"

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: the guess
        """
        self.guesses.append(number)
        return "yes" if number == self.secret else "no"

    def get_reward(self) -> float:
        return float(self.secret in self.guesses)


def test_each_episode_has_an_environment_of_its_own_that_is_reset_by_its_row_and_pays(chat: Any) -> None:
    seen: list[Any] = []

    def look(environments: Any, completions: Any) -> list[float]:
        seen.extend(list(environment.guesses) for environment in environments)
        return [0.0] * len(completions)

    Box.made = 0
    toolbox = Toolbox([double], Box)
    assert list(toolbox.tools) == ["double", "guess"]
    rows = [[call("guess", number=0), "done"], [call("guess", number=0), call("guess", number=1), "done"], ["done"]]
    for _ in range(2):
        engine = Scripted(chat, rows)
        prompts = prompts_of(chat, ["a?", "b?", "c?"], toolbox.schemas)
        with collector_of(chat, engine, toolbox, [look, *toolbox.rewards]) as collector:
            experience = collector.collect(prompts, 1, 1, Clock())
        assert experience.scores.parts["Box"] == [1.0, 1.0, 0.0]
    assert "b? up to 6\n" in chat.decode(engine.prompts[0][1])
    assert experience.rollouts.prompt_ids_B[1] == engine.prompts[0][1]
    assert seen == [[0], [0, 1], []] * 2
    assert Box.made == 3  # made once, reset often


class CallsFirst(CallReader):
    """Reads a call out of every first turn."""

    def __call__(self, ids: Sequence[int], before: Sequence[int], text: str) -> Turn:
        first = self.tokenizer.decode(list(before)).count("a:") == 1
        turn = super().__call__(ids, before, text)
        return Turn(turn.message, (ToolCall("double", {"number": len(text)}),)) if first and text else turn


def test_a_run_with_tools_trains_what_was_sampled(
    chat: Any, make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model calls nothing, so its first turns are read as calls."""
    monkeypatch.setattr("llm_pg.run.tools.CallReader", CallsFirst)
    trainer = GRPOTrainer(
        model=make_model("llama", max_position_embeddings=512),
        reward_funcs=told,
        args=check_values({
            "name": "grpo", "output_dir": str(tmp_path), "run_name": "r", "max_steps": 2, "prompts_per_step": 2,
            "num_generations": 4, "max_completion_length": 48, "num_eval_prompts": 2, "eval_num_samples": 2,
            "use_cpu": True, "reward_workers": 1,
        }),
        train_dataset=[{"prompt": [{"role": "user", "content": f"{i}?"}]} for i in range(8)],
        processing_class=chat,
        tools=[double],
        terminal=Terminal(quiet=True),
    )  # fmt: skip
    trainer.train()
    lines = read_metrics(tmp_path / "r" / "metrics.jsonl")
    assert len(lines) == 2
    assert min(line["log/inserted_tokens"] for line in lines) > 0
    assert max(line["sampler_gap"] for line in lines) < 1e-4
    assert torch.isfinite(torch.tensor([line["grad_norm"] for line in lines])).all()
    assert "double;" in trainer.train_prompts[0].text
    assert trainer.config.rollout.tools == [f"{double.__module__}:double"]


def unhinted(number):  # type: ignore[no-untyped-def]
    """Has no type.

    Args:
        number: any
    """
    return number


@pytest.mark.parametrize(
    "tools, factory, words",
    [
        ([unhinted], None, "type hint"),
        (["calcolator"], None, "Did you mean 'calculator'"),
        (["nowhere.py:tool"], None, "no file"),
        ([double, double], None, "Two tools are called 'double'"),
        ([3], None, "a function or its address"),
        ("double", None, "a list of functions"),
        ((), {"a": Box, "b": 3}, "makes an environment when it is called"),
        ((), dict, "no method reset"),
    ],
)
def test_a_tool_that_cannot_be_shown_is_refused(tools: Any, factory: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Toolbox(tools, factory)
