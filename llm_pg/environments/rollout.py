"""Episodes of several turns over any sampler: the model speaks, the environment answers, until one of them ends it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..device import to_device
from ..prompts import Prompt
from ..prompts.decode import Reader
from ..rewards.scorer import Scorer
from ..rollouts import Inserted
from ..sampling.protocol import Completions, SamplingEngine, SamplingParams
from ..sampling.random import stream_key
from .writing import TurnWriter

ENVIRONMENT_STREAM = 7  # the turns of a row are numbered from 1


@dataclass(frozen=True)
class EpisodeLimits:
    """max_turns: of the model. max_length: tokens after the prompt, the environment's included. max_turn_length: of one
    turn; None = what is left."""

    max_turns: int
    max_length: int
    max_turn_length: int | None = None


@dataclass
class Episode:
    """One row as it grows.

    context: the ids after the prompt. ids, logp: what was sampled, and its log-probability. inserted: see
    `TextRollouts`. turns, replies: the texts of the model, and of the environment. ends: the step of each turn's last
    token. rewards: of each turn. truncated: a limit ended it. scorable: False where the environment failed.
    """

    prompt: Prompt
    seed: int
    context: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    inserted: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    is_over: bool = False
    truncated: bool = False
    scorable: bool = True

    @property
    def transcript(self) -> str:
        """The text after the prompt."""
        replies = [*self.replies, *[""] * len(self.turns)]
        return "".join(turn + reply for turn, reply in zip(self.turns, replies, strict=False))

    def pieces(self) -> Inserted:
        """What was inserted, less what nothing came after."""
        return tuple(piece for piece in self.inserted if piece[0] < len(self.ids))


class Conversations:
    """Plays episodes.

    Args:
        engine: samples. scorer: its one function is the environment (`as_reward_function`).
        reader, writer: to read turns, and to write the replies to them.
    """

    def __init__(
        self, engine: SamplingEngine, scorer: Scorer, reader: Reader, writer: TurnWriter, limits: EpisodeLimits
    ) -> None:
        self.engine, self.scorer, self.reader, self.writer = engine, scorer, reader, writer
        self.limits = limits
        self._batch = 0

    def play(
        self, prompts: Sequence[Prompt], num_generations: int, params: SamplingParams, keys_B: Tensor, step: int = 0
    ) -> tuple[list[Episode], dict[str, dict[str, int]]]:
        """`num_generations` episodes of each prompt, prompt by prompt, and how often the environment failed by cause.

        keys_B: a random stream a row; turn k > 0 draws from the stream (key, k), turn 0 from the key itself, so that an
        episode of one turn is the completion that a task without an environment samples.
        """
        seeds = (stream_key(keys_B, -ENVIRONMENT_STREAM) & (2**63 - 1)).tolist()
        rows = [prompt for prompt in prompts for _ in range(num_generations)]
        episodes = [Episode(prompt, seed) for prompt, seed in zip(rows, seeds, strict=True)]
        problems: dict[str, Counter[str]] = {}
        self._batch += 1
        for turn in range(self.limits.max_turns):
            live = [i for i, episode in enumerate(episodes) if not episode.is_over]
            if not live:
                break
            if turn == 0:
                done = self._sample([p.ids for p in prompts], num_generations, params, keys_B, self.limits.max_length)
            else:
                room = max(self.limits.max_length - len(episodes[i].context) for i in live)
                heard = [(*episodes[i].prompt.ids, *episodes[i].context) for i in live]
                done = self._sample(heard, 1, params, stream_key(keys_B[live], turn), room)
            speaking = [episodes[i] for i in live]
            cut = self._hear(speaking, done)
            self._answer(speaking, cut, step, problems)
        for episode in episodes:
            if not episode.is_over:
                episode.is_over = episode.truncated = True
        return episodes, {name: dict(causes) for name, causes in problems.items()}

    def _sample(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, params: SamplingParams, keys: Tensor, room: int
    ) -> Completions:
        length = min(room, self.limits.max_turn_length or room)
        turn_params = dataclasses.replace(params, max_completion_length=length)
        return self.engine.sample(prompt_ids, num_generations, turn_params, keys)

    def _hear(self, speaking: Sequence[Episode], done: Completions) -> list[bool]:
        """Take in what was sampled; True where a turn was cut by a limit."""
        lengths, cut = done.mask_BT.sum(1).tolist(), done.truncated_B.tolist()
        tokens, logps = done.tokens_BT.tolist(), done.logp_BT.tolist()
        for row, episode in enumerate(speaking):
            room = self.limits.max_length - len(episode.context)
            cut[row] = cut[row] or lengths[row] > room
            n = min(lengths[row], room)
            episode.context += tokens[row][:n]
            episode.ids += tokens[row][:n]
            episode.logp += logps[row][:n]
            episode.ends.append(len(episode.ids) - 1)
            episode.turns += self.reader([tokens[row][:n]])
        return cut

    def _answer(
        self, speaking: Sequence[Episode], cut: Sequence[bool], step: int, problems: dict[str, Counter[str]]
    ) -> None:
        """What the environment says to each turn."""
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
            {"global_step": step},
        )
        for name, causes in scores.problems.items():
            problems.setdefault(name, Counter()).update(causes)
        for row, episode in enumerate(speaking):
            reward = scores.reward[row]
            if reward is None:
                episode.scorable, episode.is_over = False, True
                continue
            episode.rewards.append(reward)
            self._go_on(episode, cut[row], *(scores.extra[name][row] for name in ("reply", "role", "done")))

    def _go_on(self, episode: Episode, is_cut: bool, reply: str, role: str, is_done: bool) -> None:
        """Write the reply behind the turn, unless the episode ends here."""
        episode.replies.append(reply)
        if is_done:
            episode.is_over, episode.truncated = True, is_cut
            return
        chat = episode.prompt.messages is not None
        ids = self.writer.ids(reply, episode.ids[-1], role if chat else None)
        if is_cut or len(episode.context) + len(ids) >= self.limits.max_length:
            episode.is_over = episode.truncated = True
            return
        if ids:
            episode.inserted.append((len(episode.ids), ids))
            episode.context += ids


def as_tensors(episodes: Sequence[Episode], pad_id: int, device: torch.device) -> dict[str, Any]:
    """The episodes as fields of `TextRollouts`: a step is a sampled token, a reward is at its turn's last one."""
    num_rows, width = len(episodes), max(len(episode.ids) for episode in episodes)
    tokens_BT = torch.full((num_rows, width), pad_id, dtype=torch.int64)
    logp_BT, reward_BT = torch.zeros(num_rows, width), torch.zeros(num_rows, width)
    mask_BT = torch.zeros(num_rows, width, dtype=torch.bool)
    for row, episode in enumerate(episodes):
        n = len(episode.ids)
        tokens_BT[row, :n], mask_BT[row, :n] = torch.tensor(episode.ids), True
        logp_BT[row, :n] = torch.tensor(episode.logp, dtype=torch.float32)
        if episode.scorable:
            for end, reward in zip(episode.ends, episode.rewards, strict=True):
                reward_BT[row, end] += reward
    tensors = {"tokens_BT": tokens_BT, "mask_BT": mask_BT, "logp_BT": logp_BT, "reward_BT": reward_BT}
    tensors["valid_B"] = torch.tensor([episode.scorable for episode in episodes])
    tensors["truncated_B"] = torch.tensor([episode.truncated for episode in episodes])
    placed: dict[str, Any] = {name: to_device(x, device) for name, x in tensors.items()}
    pieces = [episode.pieces() for episode in episodes]
    return placed | {
        "inserted_B": pieces if any(pieces) else None,
        "prompt_ids_B": [episode.prompt.ids for episode in episodes],
    }
