"""Experience from an environment of several turns, in the form of experience from single completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..environments.partner import Partner, ToolPartner
from ..environments.protocol import ENVIRONMENTS
from ..environments.rollout import Conversations, Episode, EpisodeLimits, as_tensors
from ..metrics import Clock
from ..prompts import Prompt
from ..prompts.decode import Reader
from ..rewards.scorer import Scorer
from ..rewards.tally import RewardError, Scores
from ..rollouts import TextRollouts, is_last, known
from ..sampling.protocol import SamplingEngine, SamplingParams
from .collector import Collector
from .experience import Experience
from .sampler import EVAL_STREAM, TRAIN_STREAM, of_tokens, parts_of


class Transcript(str):
    """The text of an episode, and the episode."""

    episode: Episode

    def __new__(cls, episode: Episode) -> Transcript:
        made = super().__new__(cls, episode.transcript)
        made.episode = episode
        return made

    def __deepcopy__(self, memo: Any) -> Transcript:
        """A text does not change."""
        return self


class EpisodeCollector(Collector):
    """A collector whose completions are episodes. Their rewards come from the environment.

    Args:
        scorer: its one function is the environment. partner, limits: see `environments`.
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
        partner: Partner,
        limits: EpisodeLimits,
        max_unscorable: float = 0.2,
        device: torch.device | None = None,
        reader: Reader | None = None,
    ) -> None:
        super().__init__(engine, scorer, tokenizer, params, seed=seed, gamma=gamma, reader=reader)
        self.conversations = Conversations(engine, partner, self.sampler.reader, limits)
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
        with clock("reward"):
            scores = self._judge(episodes, problems, step)
        greedy_P: list[float | None] = []
        if greedy:
            with clock("sample"):
                keys_P = self.keys(len(prompts), 1, TRAIN_STREAM, step, first_place)
                alone, problems = self.conversations.play(prompts, 1, self._greedy, keys_P, step)
            with clock("reward"):
                greedy_P = self._judge(alone, problems, step, checked=False).reward
        fields = as_tensors(episodes, int(self.tokenizer.pad_token_id), self.device)
        mask_BT = fields["mask_BT"]
        if scores.tokens is not None:
            fields["reward_BT"] = of_tokens(fields["reward_BT"], scores.tokens) * fields["valid_B"].unsqueeze(1)
        if scores.weights:
            fields |= parts_of(scores, self.device)
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
        texts = [episode.transcript for episode in episodes]
        return Experience(list(prompts), rollouts, texts, scores, num_generations, self.sampler.pieces)

    def answer(
        self, prompts: Sequence[Prompt], num_samples: int, greedy: bool, first_place: int = 0
    ) -> list[tuple[str, list[int]]]:
        """Episodes for evaluation: their transcripts, and the sampled ids."""
        keys_B = self.keys(len(prompts), num_samples, EVAL_STREAM, 0, first_place)
        params = self._greedy if greedy else self.params
        episodes, _ = self.conversations.play(prompts, num_samples, params, keys_B)
        return [(Transcript(episode), episode.ids) for episode in episodes]

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str], ids: Sequence[list[int]], step: int = 0) -> Scores:
        """The returns of the episodes of `answer`: each was scored while it was played."""
        returns = [_outcome(text.episode) if isinstance(text, Transcript) else None for text in texts]
        return Scores(returns, {self._name: returns})

    def _judge(
        self, episodes: Sequence[Episode], problems: dict[str, dict[str, int]], step: int, *, checked: bool = True
    ) -> Scores:
        """What the episodes earned. checked: RewardError where too many failed."""
        if checked:
            self._check(episodes, problems)
        returns = [_outcome(episode) for episode in episodes]
        return Scores(returns, {self._name: returns}, metrics=_facts(episodes), problems=problems)

    def _check(self, episodes: Sequence[Episode], problems: dict[str, dict[str, int]]) -> None:
        lost = sum(not episode.scorable for episode in episodes)
        if lost > self.max_unscorable * len(episodes) / self.scorer.share:
            causes = ", ".join(f"{cause}: {count}" for cause, count in problems.get(self._name, {}).items())
            raise RewardError(
                f"Environment {self._name} failed in {lost} of {len(episodes)} episodes of this batch ({causes}): over "
                f"the limit max_unscorable={self.max_unscorable:g}."
            )


class ToolCollector(EpisodeCollector):
    """A collector whose completions are conversations with tools. Reward functions judge them once they have ended.

    Args:
        partner: answers calls. others: as for `EpisodeCollector`, but the scorer's functions are any.
    """

    def __init__(self, *args: Any, partner: ToolPartner, **others: Any) -> None:
        super().__init__(*args, partner=partner, **others)
        self.partner = partner

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.partner.runner.__exit__(*error)
        self.partner.toolbox.close()

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str], ids: Sequence[list[int]], step: int = 0) -> Scores:
        """Rewards of the episodes of `answer`; of other texts as of completions without a call."""
        episodes = [text.episode for text in texts if isinstance(text, Transcript)]
        if len(episodes) < len(texts):
            return Collector.score(self, prompts, texts, ids, step)
        return self._graded(episodes, max(step - 1, 0))

    def _judge(
        self, episodes: Sequence[Episode], problems: dict[str, dict[str, int]], step: int, *, checked: bool = True
    ) -> Scores:
        """What the reward functions say, paid at the last token."""
        scores = self._graded(episodes, max(step - 1, 0))
        for episode, reward in zip(episodes, scores.reward, strict=True):
            episode.scorable = reward is not None
            episode.rewards = [0.0] * (len(episode.ends) - 1) + [reward or 0.0]
        calls, failures = self.partner.num_calls, self.partner.num_failures
        scores.metrics |= _facts(episodes) | {
            "tools/call_frequency": calls / len(episodes),
            "tools/failure_frequency": failures / max(calls, 1),
        }
        return scores

    def _graded(self, episodes: Sequence[Episode], num_steps: int) -> Scores:
        """Scores in TRL's form: a completion is the list of its messages. The environments are free again."""
        rows = [episode.prompt.row for episode in episodes]
        toolbox = self.partner.toolbox
        if toolbox.environments:
            rows = [{**row, ENVIRONMENTS: episode.environment} for row, episode in zip(rows, episodes, strict=True)]
        scores = self.scorer.grade(
            [episode.prompt.messages for episode in episodes],
            [episode.messages for episode in episodes],
            [episode.ids for episode in episodes],
            rows,
            self._state(num_steps),
        )
        for episode in episodes:
            toolbox.give_back(toolbox.name_of(episode.prompt.row), episode.environment)
            episode.environment = None
        return scores


def _facts(episodes: Sequence[Episode]) -> dict[str, float]:
    turns = sum(len(episode.turns) for episode in episodes) / len(episodes)
    inserted = sum(len(ids) for episode in episodes for _, ids in episode.pieces()) / len(episodes)
    return {"turns": turns, "inserted_tokens": inserted}


def _outcome(episode: Episode) -> float | None:
    """The sum of an episode's rewards."""
    return math.fsum(episode.rewards) if episode.scorable else None
