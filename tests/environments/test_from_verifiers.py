"""A real environment of the verifiers library, driven turn by turn."""

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
from datasets import Dataset

from llm_pg.environments import make

vf = pytest.importorskip("verifiers")
if not hasattr(vf, "Client"):
    pytest.skip(f"verifiers {vf.__version__} has no environments of this kind", allow_module_level=True)

ROW = {"prompt": [{"role": "user", "content": "Guess a number from 1 to 7."}], "answer": "5", "example_id": 3}


class Guessing(vf.MultiTurnEnv):
    """Higher or lower; a guess of 0 rewrites what was said."""

    async def env_response(self, messages: Any, state: Any, **kwargs: Any) -> Any:
        guess = int(messages[-1]["content"])
        if guess == 0:
            messages[-1].content = "forged"  # of 0.1.12 up to 0.1.x a message is an object
        word = "higher" if guess < int(state["answer"]) else "lower"
        return [{"role": "user", "content": word}]

    @vf.stop
    async def won(self, state: Any) -> bool:
        turns = state["trajectory"]
        return bool(turns) and turns[-1]["completion"][-1]["content"] == state["answer"]


def won(completion: Any, answer: str) -> float:
    return float(completion[-1]["content"] == answer)


def turns(completion: Any) -> float:
    return len([m for m in completion if m["role"] == "assistant"]) / 10


@pytest.fixture(autouse=True)
def game() -> Iterator[None]:
    module = types.ModuleType("llm_pg_guessing")

    def load_environment(max_turns: int = 4) -> Any:
        rubric = vf.Rubric(funcs=[won, turns], weights=[1.0, 0.5])
        return Guessing(dataset=Dataset.from_list([ROW]), rubric=rubric, max_turns=max_turns)

    module.load_environment = load_environment  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    yield
    del sys.modules[module.__name__]


def played(texts: list[str], **env_args: Any) -> list[Any]:
    environment = make("verifiers", {"env_id": "llm_pg_guessing", "env_args": env_args})
    environment.reset(ROW, 0)
    return [environment.step(text) for text in texts]


def test_the_rollout_ends_by_the_environments_own_stop_and_earns_the_rubrics_reward() -> None:
    replies = played(["4", "6", "5"])
    assert [(r.text, r.role, r.reward, r.done) for r in replies] == [
        ("higher", "user", 0.0, False),
        ("lower", "user", 0.0, False),
        ("", "user", 1.0 + 0.5 * 0.3, True),
    ]


def test_the_environments_own_limit_of_turns_holds() -> None:
    replies = played(["1", "1"], max_turns=2)
    assert [reply.done for reply in replies] == [False, True]
    assert replies[-1].reward == pytest.approx(0.5 * 0.2)


def test_two_episodes_of_one_environment_do_not_meet() -> None:
    environments = [make("verifiers", {"env_id": "llm_pg_guessing"}) for _ in range(2)]
    for environment, answer in zip(environments, ("5", "2"), strict=True):
        environment.reset({**ROW, "answer": answer}, 0)
    assert [e.step("3").text for e in environments] == ["higher", "lower"]
    assert [e.step(a).reward for e, a in zip(environments, ("5", "2"), strict=True)] == pytest.approx([1.1, 1.1])


def test_an_environment_that_rewrites_what_was_said_is_refused() -> None:
    with pytest.raises(ValueError, match="rewrote the conversation"):
        played(["0"])
