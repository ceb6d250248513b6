"""What a collector gives its engine and its reward functions, and which of its parts it opens and closes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from llm_pg.metrics import Clock
from llm_pg.prompts import Prompt
from llm_pg.rewards.scorer import Scorer
from llm_pg.rollout.collector import Collector
from llm_pg.rollout.dual_scoring import DualScoring
from llm_pg.rollout.sampler import EVAL_STREAM, TRAIN_STREAM, Sampler
from llm_pg.sampling.protocol import Completions, SamplingParams
from tests.tiny import encoded

PARAMS = SamplingParams(temperature=0.7, top_k=9, max_completion_length=4, stop=("z",))
CHAT = [{"role": "user", "content": "hello"}]


class Engine:
    """Samples as many of the token `first` as the row's number in the batch says, and remembers what it was given."""

    def __init__(self, first: int = 5) -> None:
        self.first = first
        self.given: list[tuple[list[tuple[int, ...]], int, SamplingParams, list[int]]] = []
        self.open = 0

    def sample(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, params: SamplingParams, keys_B: torch.Tensor
    ) -> Completions:
        self.given.append(([tuple(ids) for ids in prompt_ids], num_generations, params, keys_B.tolist()))
        num = len(prompt_ids) * num_generations
        mask_BT = torch.arange(num) < torch.arange(1, num + 1).unsqueeze(1)
        tokens_BT = torch.where(mask_BT, self.first, 0)
        return Completions(tokens_BT, mask_BT, -1.0 * mask_BT, torch.zeros(num, dtype=torch.bool))


class OpenedEngine(Engine):
    def __enter__(self) -> OpenedEngine:
        self.open += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.open -= 1


class Functions:
    """A reward function that pays the number of tokens and remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def __call__(self, prompts: Any, completions: Any, completion_ids: Any, trainer_state: Any, **row: Any) -> Any:
        told = {"prompts": prompts, "completions": completions, "ids": completion_ids, "state": trainer_state, **row}
        self.told.append(told)
        return [float(len(ids)) for ids in completion_ids]


@pytest.fixture
def functions() -> Functions:
    return Functions()


@pytest.fixture
def make(functions: Functions, tokenizer: Any) -> Callable[..., Collector]:
    def collector(engine: Any = None, **changes: Any) -> Collector:
        given = {"seed": 3, "gamma": 0.5, **changes}
        scorer = Scorer([functions], in_process=True)
        return Collector(engine or Engine(), scorer, tokenizer, PARAMS, **given)

    return collector


@pytest.fixture
def prompts(tokenizer: Any) -> list[Prompt]:
    return encoded(tokenizer, ["ab=", "x"])


def state(told: dict[str, Any]) -> dict[str, int]:
    of = told["state"]
    return {name: getattr(of, name) for name in ("global_step", "max_steps")}


def test_training_samples_by_the_training_distribution_from_the_streams_of_its_step(
    make: Callable[..., Collector], prompts: list[Prompt]
) -> None:
    collector = make()
    collector.collect(prompts, 4, 3, Clock(), 7)
    expected = Sampler.keys(3, TRAIN_STREAM, 4, 2, 3, 7).tolist()
    assert collector.engine.given == [([p.ids for p in prompts], 3, PARAMS, expected)]  # type: ignore[attr-defined]
    assert collector.params is PARAMS


def test_streams_are_those_of_the_runs_seed_from_the_first_place_on(make: Callable[..., Collector]) -> None:
    assert torch.equal(make().keys(2, 3, TRAIN_STREAM, 4), Sampler.keys(3, TRAIN_STREAM, 4, 2, 3, 0))
    assert torch.equal(make(seed=8).keys(2, 3, EVAL_STREAM, 0, 5), Sampler.keys(8, EVAL_STREAM, 0, 2, 3, 5))


def test_an_evaluation_samples_from_streams_of_its_own_and_one_of_argmax_at_the_same_limits(
    make: Callable[..., Collector], prompts: list[Prompt], tokenizer: Any
) -> None:
    collector = make()
    answers = collector.answer(prompts, 3, greedy=False, first_place=5)
    engine: Any = collector.engine
    expected = Sampler.keys(3, EVAL_STREAM, 0, 2, 3, 5).tolist()
    assert engine.given == [([p.ids for p in prompts], 3, PARAMS, expected)]
    assert answers == [(tokenizer.decode([5] * n), [5] * n) for n in range(1, 7)]
    collector.answer(prompts, 1, greedy=True)
    argmax = SamplingParams(greedy=True, max_completion_length=4, stop=("z",))
    assert engine.given[1][1:] == (1, argmax, Sampler.keys(3, EVAL_STREAM, 0, 2, 1, 0).tolist())


def test_greedy_rewards_are_of_one_completion_a_prompt_at_its_limits(
    make: Callable[..., Collector], prompts: list[Prompt]
) -> None:
    collector = make()
    batch = collector.collect(prompts, 4, 3, Clock(), greedy=True)
    engine: Any = collector.engine
    argmax = SamplingParams(greedy=True, max_completion_length=4, stop=("z",))
    assert [(given[1], given[2]) for given in engine.given] == [(3, PARAMS), (1, argmax)]
    assert batch.rollouts.greedy_B.tolist() == [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]  # a token, and two


@pytest.mark.parametrize("step, done", [(1, 0), (4, 3)])
def test_functions_are_told_the_updates_that_are_done_and_how_many_the_run_has(
    step: int, done: int, make: Callable[..., Collector], prompts: list[Prompt], functions: Functions
) -> None:
    collector = make()
    collector.max_steps = 9
    collector.collect(prompts, step, 2, Clock(), greedy=True)
    assert [state(told) for told in functions.told] == [{"global_step": done, "max_steps": 9}] * 2
    collector.score(prompts, ["a", "b"], [[1], [1, 2]], step)
    assert state(functions.told[-1]) == {"global_step": done, "max_steps": 9}


def test_an_evaluation_tells_functions_of_no_update_and_a_run_of_unknown_length_of_no_last_one(
    make: Callable[..., Collector], prompts: list[Prompt], functions: Functions
) -> None:
    make().score(prompts, ["a", "b"], [[1], [1, 2]])
    assert state(functions.told[0]) == {"global_step": 0, "max_steps": 0}


def test_answers_are_scored_with_their_own_prompts_and_conversations_as_messages(
    make: Callable[..., Collector], functions: Functions
) -> None:
    asked = [Prompt(0, "p", None, (1,), {"n": 1}), Prompt(1, "q", CHAT, (2,), {"n": 2})]
    scores = make().score(asked, ["yes", "no"], [[1, 2], [3]])
    assert scores.reward == [2.0, 1.0]
    told = functions.told[0]
    assert told["prompts"] == ["p", CHAT]
    assert told["completions"] == ["yes", [{"role": "assistant", "content": "no"}]]
    assert (told["ids"], told["n"]) == ([[1, 2], [3]], [1, 2])


def test_the_discount_and_the_reader_are_those_that_were_given(
    make: Callable[..., Collector], prompts: list[Prompt]
) -> None:
    collector = make(reader=lambda rows: [f"{len(ids)} tokens" for ids in rows])
    batch = collector.collect(prompts, 1, 2, Clock())
    assert batch.texts == ["1 tokens", "2 tokens", "3 tokens", "4 tokens"]
    assert batch.rollouts.discount_BT[1].tolist() == [0.5, 0.0, 0.0, 0.0]


def test_the_same_collector_over_another_engine_keeps_all_else_and_leaves_the_first(
    make: Callable[..., Collector], prompts: list[Prompt], functions: Functions
) -> None:
    first, engine = make(reader=lambda rows: ["read"] * len(rows)), Engine(6)
    first.max_steps = 9
    other = first.with_engine(engine)
    batch = other.collect(prompts, 1, 1, Clock())
    assert batch.texts == ["read", "read"]
    assert batch.rollouts.tokens_BT.max() == 6
    assert batch.rollouts.discount_BT[1].tolist() == [0.5, 0.0]
    assert engine.given[0][2:] == (PARAMS, Sampler.keys(3, TRAIN_STREAM, 1, 2, 1).tolist())
    assert state(functions.told[0]) == {"global_step": 0, "max_steps": 9}
    assert first.engine is not engine
    assert first.engine.given == []  # type: ignore[attr-defined]
    assert other.tokenizer is first.tokenizer


def strictly(prompts: Any, completions: Any, **row: Any) -> list[float]:
    return [float(text == "a") for text in completions]


def test_the_other_reading_of_an_answer_is_scored_beside_what_decides(
    make: Callable[..., Collector], prompts: list[Prompt]
) -> None:
    deciding = [0.25, 0.5]
    assert make().readings(prompts, ["a", "b"], [[1], [1, 2]], deciding) == {}  # type: ignore[arg-type]
    with Scorer([strictly], in_process=True) as scorer:
        collector = make(dual_scoring=DualScoring(scorer, {"strict": "strictly", "lenient": None}))
        found = collector.readings(prompts, ["a", "b"], [[1], [1, 2]], deciding)  # type: ignore[arg-type]
    assert found == {"strict": [1.0, 0.0], "lenient": deciding}


def test_what_needs_more_than_this_process_is_open_inside_the_block(make: Callable[..., Collector]) -> None:
    """Engine and the other reading's scorer; an engine that needs nothing is left alone."""
    opened: list[str] = []

    @contextlib.contextmanager
    def scorer() -> Any:
        opened.append("in")
        yield
        opened.append("out")

    engine = OpenedEngine()
    with make(engine, dual_scoring=DualScoring(scorer(), {})) as collector:  # type: ignore[arg-type]
        assert (engine.open, opened) == (1, ["in"])
        assert collector.engine is engine
    assert (engine.open, opened) == (0, ["in", "out"])
    with make(Engine()):
        pass
