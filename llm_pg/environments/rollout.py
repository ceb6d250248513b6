"""Episodes of several turns over any sampler: the model speaks, its partner answers, until one of them ends it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..device import to_device
from ..prompts import Prompt
from ..prompts.decode import Reader
from ..rollouts import Inserted
from ..sampling.protocol import Completions, SamplingEngine, SamplingParams
from ..sampling.random import stream_key
from .partner import Partner, PartnerAnswer

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
    token. rewards: of each turn. truncated: a limit ended it. scorable: False where the environment failed. messages:
    of a conversation with tools, after the prompt. environment: the object of its own that it plays with, if any.
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
    messages: list[dict[str, Any]] = field(default_factory=list)
    environment: Any = None
    is_over: bool = False
    truncated: bool = False
    scorable: bool = True

    @property
    def transcript(self) -> str:
        """The text after the prompt."""
        replies = [*self.replies, *[""] * len(self.turns)]
        return "".join(turn + reply for turn, reply in zip(self.turns, replies, strict=False))

    @property
    def turn_ids(self) -> list[int]:
        """What was sampled in the newest turn."""
        return self.ids[self.ends[-2] + 1 if len(self.ends) > 1 else 0 :]

    def pieces(self) -> Inserted:
        """What was inserted, less what nothing came after."""
        return tuple(piece for piece in self.inserted if piece[0] < len(self.ids))


class Conversations:
    """Plays episodes.

    Args:
        engine: samples. partner: answers. reader: to read turns.
    """

    def __init__(self, engine: SamplingEngine, partner: Partner, reader: Reader, limits: EpisodeLimits) -> None:
        self.engine, self.partner, self.reader, self.limits = engine, partner, reader, limits

    def play(
        self, prompts: Sequence[Prompt], num_generations: int, params: SamplingParams, keys_B: Tensor, step: int = 0
    ) -> tuple[list[Episode], dict[str, dict[str, int]]]:
        """`num_generations` episodes of each prompt, prompt by prompt, and how often the partner failed by cause.

        keys_B: a random stream a row; turn k > 0 draws from the stream (key, k), turn 0 from the key itself, so that an
        episode of one turn is the completion that a task without an environment samples.
        """
        seeds = (stream_key(keys_B, -ENVIRONMENT_STREAM) & (2**63 - 1)).tolist()
        rows = [prompt for prompt in prompts for _ in range(num_generations)]
        episodes = [Episode(prompt, seed) for prompt, seed in zip(rows, seeds, strict=True)]
        self.partner.begin(episodes, step)
        for turn in range(self.limits.max_turns):
            live = [i for i, episode in enumerate(episodes) if not episode.is_over]
            if not live:
                break
            if turn == 0:
                done = self._open(episodes, num_generations, params, keys_B)
            else:
                room = max(self.limits.max_length - len(episodes[i].context) for i in live)
                heard = [(*episodes[i].prompt.ids, *episodes[i].context) for i in live]
                done = self._sample(heard, 1, params, stream_key(keys_B[live], turn), room)
            speaking = [episodes[i] for i in live]
            cut = self._hear(speaking, done)
            for episode, is_cut, answer in zip(speaking, cut, self.partner.answer(speaking, cut), strict=True):
                self._go_on(episode, is_cut, answer)
        for episode in episodes:
            if not episode.is_over:
                episode.is_over = episode.truncated = True
        return episodes, self.partner.problems()

    def _open(
        self, episodes: Sequence[Episode], num_generations: int, params: SamplingParams, keys_B: Tensor
    ) -> Completions:
        """The first turns: of each prompt together, unless an environment has given its episodes other prompts."""
        ids = [episode.prompt.ids for episode in episodes]
        first = ids[::num_generations]
        shared = all(first[row // num_generations] == each for row, each in enumerate(ids))
        asked, each = (first, num_generations) if shared else (ids, 1)
        return self._sample(asked, each, params, keys_B, self.limits.max_length)

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

    def _go_on(self, episode: Episode, is_cut: bool, answer: PartnerAnswer) -> None:
        """Write the answer behind the turn, unless the episode ends here."""
        if answer.reward is None:
            episode.scorable, episode.is_over = False, True
            return
        episode.rewards.append(answer.reward)
        episode.replies.append(answer.text)
        if answer.done:
            episode.is_over, episode.truncated = True, is_cut
            return
        if is_cut or len(episode.context) + len(answer.ids) >= self.limits.max_length:
            episode.is_over = episode.truncated = True
            return
        episode.messages += answer.messages
        if answer.ids:
            episode.inserted.append((len(episode.ids), answer.ids))
            episode.context += answer.ids


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
