"""Environments of verifiers 0.4: the library's own game loop, with our turns in the place of its agent."""

import random
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

vf = pytest.importorskip("verifiers.v1", reason="verifiers is older than 0.4")

from llm_pg.environments import make  # noqa: E402
from llm_pg.environments.from_verifiers_agents import TASK, check_task, verifiers_rows  # noqa: E402


class Data(vf.TaskData):
    answer: int


class Sum(vf.Task[Data, vf.State, vf.TaskConfig]):
    @vf.reward(weight=2.0)
    async def right(self, trace: Any) -> float:
        return float(trace.last_reply == str(self.data.answer))

    @vf.reward
    async def short(self, trace: Any, task: Any) -> float:
        return 0.5 * (len(trace.last_reply) < 3) * (trace.num_turns == 1) * (task.answer == self.data.answer)


class Sums(vf.Taskset[Sum, vf.TasksetConfig]):
    def load(self) -> Iterator[Sum]:
        for a in range(5):
            data = Data(prompt=f"{a}+2?", system_prompt="Add.", answer=a + 2)
            yield Sum(data, self.config.task)


class GuessingConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()


class Guessing(vf.Env[GuessingConfig]):
    """Higher or lower, in four turns at most; what the last turn earns is recorded by the game and by `finalize`."""

    async def run(self, task: Any, agents: Any) -> None:
        async with agents.player.interaction(task) as talk:
            segment = await talk.turn()
            for _ in range(3):
                guess = int(segment.last_reply)
                if guess == task.data.answer:
                    break
                segment = await talk.turn("higher" if guess < task.data.answer else "lower")
        talk.trace.record_reward("won", float(segment.last_reply == str(task.data.answer)), 10.0)

    async def finalize(self, task: Any, episode: Any) -> None:
        (trace,) = episode.traces
        trace.record_reward("turns", trace.num_turns, 0.01)


class GuessSums(Sums):
    pass


class PairConfig(vf.EnvConfig):
    one: vf.AgentConfig = vf.AgentConfig()
    other: vf.AgentConfig = vf.AgentConfig()


class Pair(vf.Env[PairConfig]):
    async def run(self, task: Any, agents: Any) -> None: ...


@pytest.fixture(autouse=True)
def packages() -> Iterator[None]:
    made = {"llm_pg_sums": [Sums], "llm_pg_guess": [GuessSums, Guessing], "llm_pg_pair": [Sums, Pair]}
    for name, classes in made.items():
        module = types.ModuleType(name)
        for each in classes:
            setattr(module, each.__name__, each)
        module.__all__ = [each.__name__ for each in classes]  # type: ignore[attr-defined]
        sys.modules[name] = module
    yield
    for name in made:
        del sys.modules[name]


def played(env_id: str, place: int, texts: list[str]) -> list[tuple[str, float | None, bool]]:
    environment = make("verifiers", {"env_id": env_id})
    environment.reset(verifiers_rows(env_id, 5)[place], 0)
    return [(r.text, r.reward, r.done) for r in map(environment.step, texts)]


def test_a_plain_task_is_one_turn_and_pays_by_its_own_rewards_with_their_weights() -> None:
    row = verifiers_rows("llm_pg_sums", 2)[1]
    assert row["prompt"] == [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+2?"}]
    assert row[TASK]["answer"] == 3
    assert played("llm_pg_sums", 1, ["3"]) == [("", 2.5, True)]
    assert played("llm_pg_sums", 1, ["333"]) == [("", 0.0, True)]


def test_a_game_of_the_environment_is_played_turn_by_turn_and_judged_over_the_episode() -> None:
    assert played("llm_pg_guess", 3, ["1", "9", "5"]) == [
        ("higher", 0.0, False),
        ("lower", 0.0, False),
        ("", pytest.approx(2.0 + 10.0 + 0.03), True),
    ]
    assert played("llm_pg_guess", 3, ["1"] * 4)[-1] == ("", pytest.approx(0.04), True)


def test_two_episodes_do_not_meet() -> None:
    pair = [make("verifiers", {"env_id": "llm_pg_guess"}) for _ in range(2)]
    rows = verifiers_rows("llm_pg_guess", 5)
    for environment, place in zip(pair, (0, 4), strict=True):
        environment.reset(rows[place], 0)
    assert [environment.step("4").text for environment in pair] == ["lower", "higher"]


def test_an_environment_that_fails_raises_its_own_error_in_its_turn() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        played("llm_pg_guess", 0, ["many"])


def test_what_needs_the_librarys_own_agents_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"several agents \(one, other\)"):
        make("verifiers", {"env_id": "llm_pg_pair"})
    with pytest.raises(ValueError, match=TASK):
        make("verifiers", {"env_id": "llm_pg_sums"}).reset({"prompt": "?"}, 0)

    class Boxed(Sum):
        NEEDS_CONTAINER = True

    class Files(Sum):
        async def setup(self, trace: Any, runtime: Any) -> None: ...

    class Scored(Sum):
        @vf.reward
        async def there(self, runtime: Any) -> float:
            return 1.0

    class Stops(Sum):
        @vf.stop
        async def enough(self, trace: Any) -> bool:
            return True

    data = Data(prompt="?", answer=1)
    check_task(Sum(data))
    cases = {Boxed: "container", Files: "files", Scored: "in its machine", Stops: "@stop"}
    for kind, words in cases.items():
        with pytest.raises(ValueError, match=f"{kind.__name__} .*{words}"):
            check_task(kind(data))


def test_a_game_of_textarena_is_the_game_itself() -> None:
    """The library's own environment for it, beside the engine played by hand with the same seed and moves."""
    ta = pytest.importorskip("textarena")
    from verifiers.v1.tasksets.textarena import TextArenaData, TextArenaTask

    from llm_pg.environments.from_verifiers_agents import row_of

    game = "2048-v0-super-easy"
    for seed in range(3):
        moves = random.Random(seed).choices(["[up]", "[left]", "[down]", "[right]"], k=400)
        random.seed(seed)  # the engine draws from the global generator
        engine = ta.make(env_id=game)
        engine.reset(num_players=1)
        opening = str(engine.get_observation()[1])
        needed = next(count for count, move in enumerate(moves, 1) if engine.step(move)[0])
        environment = make("verifiers", {"env_id": "textarena", "env_args": {"game": "Wordle-v0"}})
        environment.reset(row_of(TextArenaTask(TextArenaData(prompt=opening, info={"game": game, "seed": seed}))), 0)
        replies = [environment.step(move) for move in moves[:needed]]
        assert [reply.done for reply in replies] == [False] * (needed - 1) + [True]
        assert replies[-1].reward == engine.state.rewards[0]
