"""Who answers the model between its turns: an environment that also pays, or tools that the model calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..prompts.prompt import Prompt
from ..rewards.scorer import Scorer
from .calls import CallReader, ToolCall
from .running import ToolResult, ToolRunner
from .toolbox import WHICH, Toolbox
from .writing import TurnWriter


@dataclass(frozen=True)
class PartnerAnswer:
    """What follows a turn.

    Attributes:
        text: as people read it. ids: as the model reads it. reward: of the turn; None = the episode cannot be scored.
        done: the episode is over. messages: the same in a conversation with tools; left out where
            there is no room.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    reward: float | None = 0.0
    done: bool = False
    messages: tuple[dict[str, Any], ...] = ()


class Speaker(Protocol):
    """What a partner needs of an episode."""

    prompt: Prompt
    seed: int
    context: list[int]
    ids: list[int]
    turns: list[str]
    messages: list[dict[str, Any]]
    environment: Any

    @property
    def turn_ids(self) -> list[int]: ...


class Partner(Protocol):
    """Answers the turns of episodes."""

    def begin(self, episodes: Sequence[Any], step: int) -> None:
        """Episodes begin; each may get another prompt here."""
        ...

    def answer(self, speaking: Sequence[Any], cut: Sequence[bool]) -> list[PartnerAnswer]:
        """What follows the newest turn of each. cut: that turn was cut by a limit, and nothing can follow it."""
        ...

    def problems(self) -> dict[str, dict[str, int]]:
        """How often it failed in the episodes that began last, by name and cause."""
        ...


class EnvironmentPartner:
    """An environment in reward workers; see `episode`.

    Args:
        scorer: its one function is the environment. writer: to write the replies.
    """

    def __init__(self, scorer: Scorer, writer: TurnWriter) -> None:
        self.scorer, self.writer = scorer, writer
        self._batch, self._step, self._problems = 0, 0, {}  # type: int, int, dict[str, Counter[str]]

    def begin(self, episodes: Sequence[Speaker], step: int) -> None:
        self._batch, self._step, self._problems = self._batch + 1, step, {}

    def answer(self, speaking: Sequence[Speaker], cut: Sequence[bool]) -> list[PartnerAnswer]:
        scores = self.scorer.grade(
            [episode.prompt.messages or episode.prompt.text for episode in speaking],
            [episode.turns[-1] for episode in speaking],
            [episode.ids for episode in speaking],
            [
                episode.prompt.row
                | {
                    "environment_turns": episode.turns[:-1],
                    "environment_seed": episode.seed,
                    "environment_batch": self._batch,
                }
                for episode in speaking
            ],
            {"global_step": self._step},
        )
        for name, causes in scores.problems.items():
            self._problems.setdefault(name, Counter()).update(causes)
        return [
            PartnerAnswer(reward=None)
            if reward is None
            else self._answer(episode, reward, *(scores.extra[name][row] for name in ("reply", "role", "done")))
            for row, (episode, reward) in enumerate(zip(speaking, scores.reward, strict=True))
        ]

    def _answer(self, episode: Speaker, reward: float, reply: str, role: str, is_done: bool) -> PartnerAnswer:
        if is_done:
            return PartnerAnswer(reply, (), reward, done=True)
        chat = episode.prompt.messages is not None
        return PartnerAnswer(reply, self.writer.ids(reply, episode.ids[-1], role if chat else None), reward)

    def problems(self) -> dict[str, dict[str, int]]:
        return {name: dict(causes) for name, causes in self._problems.items()}


class ToolPartner:
    """Tools that the model calls in the form of its chat template. A turn without a call is the answer and ends.

    Args:
        toolbox: the tools. readers: of calls, by the environment's name. runner: of tools. writer: of their answers.
        opening: from a prompt, what `reset` returned and the environment's name to the prompt that the model reads.

    Attributes:
        num_calls, num_failures: in the episodes that began last.
    """

    def __init__(
        self,
        toolbox: Toolbox,
        readers: Mapping[str | None, CallReader],
        runner: ToolRunner,
        writer: TurnWriter,
        opening: Callable[[Prompt, str, str | None], Prompt],
    ) -> None:
        self.toolbox, self.readers, self.runner, self.writer, self.opening = toolbox, readers, runner, writer, opening
        self.num_calls = self.num_failures = 0
        self._step = 0

    def begin(self, episodes: Sequence[Speaker], step: int) -> None:
        self._step, self.num_calls, self.num_failures = step, 0, 0
        for episode in episodes:
            name = self.toolbox.name_of(episode.prompt.row)
            episode.environment = self.toolbox.take(name)
            if episode.environment is not None:
                row = {key: value for key, value in episode.prompt.row.items() if name is None or key != WHICH}
                said = self.runner.reset(episode.environment, row)
                if said:
                    episode.prompt = self.opening(episode.prompt, said, name)

    def answer(self, speaking: Sequence[Speaker], cut: Sequence[bool]) -> list[PartnerAnswer]:
        names = [self.toolbox.name_of(episode.prompt.row) for episode in speaking]
        turns = [
            self.readers[name](
                episode.turn_ids,
                [*episode.prompt.ids, *episode.context[: len(episode.context) - len(episode.turn_ids)]],
                episode.turns[-1],
            )
            for name, episode in zip(names, speaking, strict=True)
        ]
        asked: list[tuple[int, ToolCall]] = []
        for row, (episode, turn) in enumerate(zip(speaking, turns, strict=True)):
            episode.messages.append(turn.message)
            asked += [(row, call) for call in turn.calls if not cut[row]]
        tools = {name: self.toolbox.tools_of(name) for name in set(names)}
        results = self.runner.run(
            [call for _, call in asked],
            [speaking[row].environment for row, _ in asked],
            self._step,
            [tools[names[row]] for row, _ in asked],
        )
        self.num_calls += len(results)
        self.num_failures += sum(result.failed for result in results)
        answers: list[list[tuple[ToolCall, ToolResult]]] = [[] for _ in speaking]
        for (row, call), result in zip(asked, results, strict=True):
            answers[row].append((call, result))
        return [self._answer(episode, each) for episode, each in zip(speaking, answers, strict=True)]

    def _answer(self, episode: Speaker, results: Sequence[tuple[ToolCall, ToolResult]]) -> PartnerAnswer:
        if not results:
            return PartnerAnswer(done=True)
        messages = tuple({"role": "tool", "name": call.name, "content": result.text} for call, result in results)
        ids = self.writer.tool_ids(messages, episode.ids[-1])
        text = "".join(f"\n[{each['name']}] {each['content']}\n" for each in messages)
        return PartnerAnswer(text, ids, messages=messages)

    def problems(self) -> dict[str, dict[str, int]]:
        return {}
