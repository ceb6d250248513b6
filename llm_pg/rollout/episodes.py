"""Experience from an environment of several turns, in the form of experience from single completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..environments.rollout import Conversations, Episode, EpisodeLimits, as_tensors
from ..environments.writing import TurnWriter
from ..metrics import Clock
from ..prompts import Prompt
from ..prompts.decode import Reader
from ..rewards.scorer import Scorer
from ..rewards.tally import RewardError, Scores
from ..rollouts import TextRollouts, is_last, known
from ..sampling.protocol import SamplingEngine, SamplingParams
from .collector import Collector
from .experience import Experience
from .sampler import EVAL_STREAM, TRAIN_STREAM


class Transcript(str):
    """The text of an episode, with its return: None = it could not be scored."""

    outcome: float | None

    def __new__(cls, text: str, outcome: float | None = None) -> Transcript:
        made = super().__new__(cls, text)
        made.outcome = outcome
        return made


class EpisodeCollector(Collector):
    """A collector whose completions are episodes. Their rewards come from the environment.

    Args:
        scorer: its one function is the environment. writer, limits: see `environments`.
        max_unscorable: share of episodes that may fail before the run stops.
        device: of the tensors; None = the CPU. others: as for `Collector`.
    """

    def __init__(
        self,
        engine: SamplingEngine,
        scorer: Scorer,
        tokenizer: Any,
        params: SamplingParams,
        *,
        seed: int,
        gamma: float,
        writer: TurnWriter,
        limits: EpisodeLimits,
        max_unscorable: float = 0.2,
        device: torch.device | None = None,
        reader: Reader | None = None,
    ) -> None:
        super().__init__(engine, scorer, tokenizer, params, seed=seed, gamma=gamma, reader=reader)
        self.conversations = Conversations(engine, scorer, self.sampler.reader, writer, limits)
        self.max_unscorable, self.device = max_unscorable, device or torch.device("cpu")

    @property
    def _name(self) -> str:
        return self.scorer.functions[0].name

    def collect(
        self,
        prompts: Sequence[Prompt],
        step: int,
        num_generations: int,
        clock: Clock,
        first_place: int | Tensor = 0,
        *,
        greedy: bool = False,
    ) -> Experience:
        """See `Collector.collect`. The environment plays while the model samples, in the phase `sample`."""
        with clock("sample"):
            keys_B = self.keys(len(prompts), num_generations, TRAIN_STREAM, step, first_place)
            episodes, problems = self.conversations.play(prompts, num_generations, self.params, keys_B, step)
            self._check(episodes, problems)
            greedy_P: list[float | None] = []
            if greedy:
                keys_P = self.keys(len(prompts), 1, TRAIN_STREAM, step, first_place)
                greedy_P = [_outcome(e) for e in self.conversations.play(prompts, 1, self._greedy, keys_P, step)[0]]
        fields = as_tensors(episodes, int(self.tokenizer.pad_token_id), self.device)
        mask_BT = fields["mask_BT"]
        if greedy:
            greedy_B, valid_B = (x_P.repeat_interleave(num_generations) for x_P in known(greedy_P, self.device))
            fields["greedy_B"] = greedy_B
            fields["valid_B"] &= valid_B
        rollouts = TextRollouts(
            group_B=torch.arange(len(prompts), device=self.device).repeat_interleave(num_generations),
            discount_BT=(mask_BT & ~is_last(mask_BT)).float() * self.gamma,
            cut_BT=torch.zeros_like(mask_BT),
            **fields,
        )
        texts, scores = [episode.transcript for episode in episodes], self._scores(episodes, problems)
        return Experience(list(prompts), rollouts, texts, scores, num_generations, self.sampler.pieces)

    def answer(
        self, prompts: Sequence[Prompt], num_samples: int, greedy: bool, first_place: int = 0
    ) -> list[tuple[str, list[int]]]:
        """Episodes for evaluation: transcripts that know their return, and the sampled ids."""
        keys_B = self.keys(len(prompts), num_samples, EVAL_STREAM, 0, first_place)
        params = self._greedy if greedy else self.params
        episodes, _ = self.conversations.play(prompts, num_samples, params, keys_B)
        return [(Transcript(episode.transcript, _outcome(episode)), episode.ids) for episode in episodes]

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str], ids: Sequence[list[int]], step: int = 0) -> Scores:
        """The returns that the transcripts of `answer` carry: an episode is scored while it is played."""
        returns = [text.outcome if isinstance(text, Transcript) else None for text in texts]
        return Scores(returns, {self._name: returns})

    def _scores(self, episodes: Sequence[Episode], problems: dict[str, dict[str, int]]) -> Scores:
        returns = [_outcome(episode) for episode in episodes]
        turns = sum(len(episode.turns) for episode in episodes) / len(episodes)
        inserted = sum(len(ids) for episode in episodes for _, ids in episode.pieces()) / len(episodes)
        reported = {"turns": turns, "inserted_tokens": inserted}
        return Scores(returns, {self._name: returns}, metrics=reported, problems=problems)

    def _check(self, episodes: Sequence[Episode], problems: dict[str, dict[str, int]]) -> None:
        lost = sum(not episode.scorable for episode in episodes)
        if lost > self.max_unscorable * len(episodes) / self.scorer.share:
            causes = ", ".join(f"{cause}: {count}" for cause, count in problems.get(self._name, {}).items())
            raise RewardError(
                f"Environment {self._name} failed in {lost} of {len(episodes)} episodes of this batch ({causes}): over "
                f"the limit max_unscorable={self.max_unscorable:g}."
            )


def _outcome(episode: Episode) -> float | None:
    """The sum of an episode's rewards."""
    return math.fsum(episode.rewards) if episode.scorable else None
