"""One batch of experience: prompts -> completions -> scores."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..metrics import Clock
from ..prompts import Prompt
from ..prompts.decode import Reader
from ..rewards.scorer import Scorer
from ..rewards.tally import Scores
from ..sampling.protocol import SamplingEngine, SamplingParams
from .dual_scoring import DualScoring
from .experience import Experience
from .sampler import EVAL_STREAM, TRAIN_STREAM, Sampler, Samples, in_trls_form


class _Speaker(NamedTuple):
    """What a `Sampler` needs of a policy."""

    tokenizer: Any
    params: SamplingParams


class Collector:
    """Samples and scores.

    Args:
        engine: samples. scorer: the reward functions. tokenizer: to read completions.
        params: the training distribution. seed: of the run. gamma: discount per token.
        dual_scoring: other readings of the answers, for evaluations.
        reader: from ids to the text that functions read; None = without any special token.
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
        dual_scoring: DualScoring | None = None,
        reader: Reader | None = None,
    ) -> None:
        self.sampler = Sampler(_Speaker(tokenizer, params), engine, gamma=gamma, reader=reader)
        self.scorer, self.seed, self.gamma, self.dual_scoring = scorer, seed, gamma, dual_scoring
        self.max_steps = 0  # of the run, for reward functions that shape themselves by its progress
        self._open = contextlib.ExitStack()

    @property
    def engine(self) -> SamplingEngine:
        return self.sampler.engine

    @property
    def tokenizer(self) -> Any:
        return self.sampler.tokenizer

    @property
    def params(self) -> SamplingParams:
        """The training distribution."""
        return self.sampler.params

    def with_engine(self, engine: SamplingEngine) -> Collector:
        """The same collector over another engine."""
        other = copy.copy(self)
        speaker = _Speaker(self.tokenizer, self.params)
        other.sampler = Sampler(speaker, engine, gamma=self.gamma, reader=self.sampler.reader)
        return other

    def __enter__(self) -> Collector:
        """Start what the engine needs beside this process; `__exit__` ends it."""
        if isinstance(self.engine, contextlib.AbstractContextManager):
            self._open.enter_context(self.engine)
        if self.dual_scoring is not None:
            self._open.enter_context(self.dual_scoring.scorer)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @contextlib.contextmanager
    def part_of_a_step(self, share: float = 1.0) -> Iterator[None]:
        """Inside the block the completions are a part of a step, all of which may be without a score.

        share: of this rank's part of the step, over which failures are counted.
        """
        before = self.scorer.share, self.scorer.whole
        self.scorer.share, self.scorer.whole = share, False
        try:
            yield
        finally:
            self.scorer.share, self.scorer.whole = before

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
        """`num_generations` scored completions of each prompt; greedy: also the reward of each one's greedy completion.

        Random streams are f(seed, step, place of the prompt in the step on all ranks, sample); `first_place` is the
        place of the first prompt given here, or the places of all (int64). (A step that straddles two epochs can hold
        a prompt twice.)
        """
        with clock("sample"):
            samples = self._draw(prompts, num_generations, self.params, TRAIN_STREAM, step, first_place)
        with clock("reward"):
            scores = self._grade(samples)
        return samples.scored(scores, self._greedy_rewards(prompts, step, clock) if greedy else None)

    def _greedy_rewards(self, prompts: Sequence[Prompt], step: int, clock: Clock) -> list[float | None]:
        """The reward of each prompt's greedy completion, under equal weights always the same."""
        with clock("sample"):
            samples = self._draw(prompts, 1, self._greedy, TRAIN_STREAM, step)
        with clock("reward"):
            return self._grade(samples).reward

    @property
    def _greedy(self) -> SamplingParams:
        params = self.params
        return SamplingParams(greedy=True, max_completion_length=params.max_completion_length, stop=params.stop)

    def answer(
        self, prompts: Sequence[Prompt], num_samples: int, greedy: bool, first_place: int = 0
    ) -> list[tuple[str, list[int]]]:
        """Completions for evaluation, text and ids, prompt by prompt; equal weights give equal answers.

        first_place: of the first prompt given here among all that are evaluated.
        """
        params = self._greedy if greedy else self.params
        samples = self._draw(prompts, num_samples, params, EVAL_STREAM, 0, first_place)
        return list(zip(samples.texts, samples.ids, strict=True))

    def _draw(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        params: SamplingParams,
        stream: int,
        step: int,
        first_place: int | Tensor = 0,
    ) -> Samples:
        keys_B = self.keys(len(prompts), num_generations, stream, step, first_place)
        return self.sampler.draw(prompts, num_generations, params, keys_B, num_steps=max(step - 1, 0))

    def _grade(self, samples: Samples) -> Scores:
        return self.scorer.grade(*samples.inputs, trainer_state=self._state(samples.num_steps))

    def _state(self, num_steps: int) -> dict[str, int]:
        return {"global_step": num_steps, "max_steps": self.max_steps}

    def keys(
        self, num_prompts: int, num_generations: int, stream: int, step: int, first_place: int | Tensor = 0
    ) -> Tensor:
        """The random stream of each row."""
        return self.sampler.keys(self.seed, stream, step, num_prompts, num_generations, first_place)

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str], ids: Sequence[list[int]], step: int = 0) -> Scores:
        """Rewards in TRL's form: conversational prompts get their completions as a list of one message.

        step: of the run, counted from 1; functions get the number of steps that are done, and 0 in an evaluation.
        """
        return self._scored(self.scorer, prompts, texts, ids, step)

    def readings(
        self, prompts: Sequence[Prompt], texts: Sequence[str], ids: Sequence[list[int]], deciding: list[float | None]
    ) -> dict[str, list[float | None]]:
        """The strict and the lenient score of each completion, where there are both; `deciding` decides a pass."""
        if self.dual_scoring is None:
            return {}
        parts = self._scored(self.dual_scoring.scorer, prompts, texts, ids).parts
        return {reading: deciding if name is None else parts[name] for reading, name in self.dual_scoring.names.items()}

    def _scored(
        self, scorer: Scorer, prompts: Sequence[Prompt], texts: Sequence[str], ids: Sequence[list[int]], step: int = 0
    ) -> Scores:
        given, completions, rows = in_trls_form(prompts, texts)
        return scorer.grade(given, completions, list(ids), rows, self._state(max(step - 1, 0)))
