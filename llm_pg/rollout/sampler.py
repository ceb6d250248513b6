"""Completions of prompts by a policy, before any reward function has seen them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..device import to_device
from ..model.loading import end_token_ids
from ..prompts import Prompt
from ..prompts.decode import Reader
from ..rewards.tally import Scores
from ..rollouts import TextRollouts, known
from ..sampling.native import NativeSampler
from ..sampling.protocol import Completions, SamplingEngine, SamplingParams
from ..sampling.random import stream_key
from .experience import Experience, Pieces

TRAIN_STREAM, EVAL_STREAM = 1, 2


class Speaks(Protocol):
    """What is sampled from: a `Policy`."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def params(self) -> SamplingParams: ...


@dataclass
class Samples:
    """Completions without scores. Row i belongs to prompt i // num_generations.

    Attributes:
        prompts: of the groups.
        num_generations: completions of each prompt.
        completions: token ids, their log-probabilities, and which were cut by the length limit.
        texts: of each completion, as reward functions get it.
        ids: token ids of each completion, unpadded.
        num_steps: updates that were done before; reward functions can read it.
        pieces: splits ids into the text of each token.
        gamma: discount for each token, in (0, 1].
    """

    prompts: list[Prompt]
    num_generations: int
    completions: Completions
    texts: list[str]
    ids: list[list[int]]
    num_steps: int
    pieces: Pieces
    gamma: float = 1.0

    @property
    def inputs(self) -> tuple[list[Any], list[Any], list[list[int]], list[Mapping[str, Any]]]:
        """What `Scorer.grade` takes: prompts, completions, ids and rows, one of each for every completion."""
        repeated = [prompt for prompt in self.prompts for _ in range(self.num_generations)]
        given, completions, rows = in_trls_form(repeated, self.texts)
        return given, completions, self.ids, rows

    def scored(self, scores: Scores, greedy: Sequence[float | None] | None = None) -> Experience:
        """Returns the rollouts of these completions.

        Args:
            scores: of each completion; None in `scores.reward` = it could not be scored.
            greedy: the reward of each prompt's greedy completion; None in it = it could not be scored.
        """
        done, group = self.completions, self.num_generations
        device = done.mask_BT.device
        others: dict[str, Tensor] = {}
        if greedy is not None:
            greedy_B, valid_B = (x_P.repeat_interleave(group) for x_P in known(greedy, device))
            others = {"greedy_B": greedy_B, "valid_B": valid_B}
        if scores.weights:
            others |= parts_of(scores, device)
        rollouts = TextRollouts.of_scored_text(
            mask_BT=done.mask_BT,
            logp_BT=done.logp_BT,
            group_B=torch.arange(len(self.prompts), device=device).repeat_interleave(group),
            reward_B=scores.reward,
            truncated_B=done.truncated_B,
            gamma=self.gamma,
            tokens_BT=done.tokens_BT,
            prompt_ids_B=[p.ids for p in self.prompts for _ in range(group)],
            **others,
        )
        if scores.tokens is not None:
            rollouts.reward_BT = of_tokens(rollouts.reward_BT, scores.tokens) * rollouts.valid_B.unsqueeze(1)
        return Experience(self.prompts, rollouts, self.texts, scores, group, self.pieces)


def of_tokens(reward_BT: Tensor, rows: Sequence[list[float] | None]) -> Tensor:
    """The rewards with those rows replaced that have one for each token."""
    host_BT = reward_BT.cpu().clone()
    for place, row in enumerate(rows):
        if row is not None:
            host_BT[place, : len(row)] = torch.tensor(row, dtype=host_BT.dtype)
    return to_device(host_BT, reward_BT.device)


def parts_of(scores: Scores, device: torch.device) -> dict[str, Tensor]:
    """What each of several reward functions said, as fields of rollouts."""
    columns = [scores.parts[name] for name in scores.weights]
    raw = [[math.nan if value is None else value for value in column] for column in columns]
    part_B = torch.tensor(raw, dtype=torch.float32, device=device).T
    weight = torch.tensor(list(scores.weights.values()), dtype=torch.float32, device=device)
    return {"part_reward_B": part_B, "part_weight_B": weight.expand_as(part_B)}


class Sampler:
    """Samples completions from a policy, by the distribution that it is trained in.

    Args:
        policy: whose tokenizer, distribution and, without an engine, present weights are used.
        engine: of `llm_pg.sampling`, or one's own; None = the native one, on the policy's model in place.
        gamma: discount per token, in (0, 1].
        reader: from ids to the text that reward functions read; None = without any special token.
    """

    def __init__(
        self, policy: Speaks, engine: SamplingEngine | None = None, *, gamma: float = 1.0, reader: Reader | None = None
    ) -> None:
        self.tokenizer, self.params, self.gamma = policy.tokenizer, policy.params, gamma
        self.engine = engine or _native(policy)
        self.reader = reader or Reader(self.tokenizer)
        self.pieces = Pieces(self.tokenizer)

    def sample(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        seed: tuple[int, int] = (0, 0),
        *,
        first_place: int | Tensor = 0,
    ) -> Samples:
        """`num_generations` completions of each prompt.

        Args:
            prompts: of one step.
            num_generations: completions of each prompt, >= 1.
            seed: (seed of the run, step), steps counted from 0. A completion is a function of them, of the place of
                its prompt in the step, and of the weights, whatever else is in the batch.
            first_place: place of the first prompt in its step, or int64 (P,) the places of all.
        """
        number, step = seed
        keys_B = self.keys(number, TRAIN_STREAM, step + 1, len(prompts), num_generations, first_place)
        return self.draw(prompts, num_generations, self.params, keys_B, num_steps=step)

    def draw(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        params: SamplingParams,
        keys_B: Tensor,
        *,
        num_steps: int = 0,
    ) -> Samples:
        """Samples as `sample` does, by any distribution and from given random streams.

        Args:
            prompts: any.
            num_generations: completions of each prompt, >= 1.
            params: the distribution and the limits; `dataclasses.replace(policy.params, greedy=True)` for greedy
                completions.
            keys_B: the random stream of each completion, int64 (P·G,), see `keys`.
            num_steps: updates that were done before, which reward functions can read.
        """
        done = self.engine.sample([prompt.ids for prompt in prompts], num_generations, params, keys_B)
        rows = torch.cat([done.mask_BT.sum(1, keepdim=True), done.tokens_BT], 1).tolist()  # the device is waited for
        ids = [row[1 : 1 + row[0]] for row in rows]
        texts = self.reader(ids)
        return Samples(list(prompts), num_generations, done, texts, ids, num_steps, self.pieces, self.gamma)

    @staticmethod
    def keys(
        seed: int, stream: int, step: int, num_prompts: int, num_generations: int, first_place: int | Tensor = 0
    ) -> Tensor:
        """Returns the random stream of each completion, int64 (P·G,).

        Args:
            seed: of the run.
            stream: 1 for training, 2 for evaluation; other numbers are free.
            step: counted from 1.
            num_prompts: P, >= 1.
            num_generations: G, >= 1.
            first_place: place of the first prompt in its step, or int64 (P,) the places of all.
        """
        place_P = first_place if isinstance(first_place, Tensor) else first_place + torch.arange(num_prompts)
        keys_PG = stream_key(seed, stream, step, place_P.unsqueeze(1), torch.arange(num_generations))
        return keys_PG.reshape(-1)


def in_trls_form(prompts: Sequence[Prompt], texts: Sequence[str]) -> tuple[list[Any], list[Any], list[Any]]:
    """Prompts, completions and rows as TRL gives them to reward functions: a conversational prompt as its messages, its
    completion as a list of one message."""
    given = [prompt.text if prompt.messages is None else prompt.messages for prompt in prompts]
    completions = [
        text if prompt.messages is None else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    return given, completions, [prompt.row for prompt in prompts]


def _native(policy: Any) -> SamplingEngine:
    ends = end_token_ids(policy.model, policy.tokenizer)
    return NativeSampler(policy.model, policy.tokenizer, ends, dtype=policy.sampling_dtype)
