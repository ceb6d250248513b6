"""One batch of experience: prompts -> completions -> scores, as Rollouts and as what a person can read."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..estimators.kl import k3
from ..metrics import Clock
from ..prompts import Prompt
from ..prompts.decode import Reader
from ..rewards.scorer import Scorer
from ..rewards.tally import Scores
from ..rollouts import TextRollouts
from ..sampling.protocol import Completions, Sampler, SamplingParams
from ..sampling.random import stream_key
from .twins import Twins

TRAIN_STREAM, EVAL_STREAM = 1, 2
MOST_TOKENS_OF_A_CHARACTER = 4  # bytes of the longest character in UTF-8


@dataclass
class Experience:
    """A scored batch. Row i belongs to prompt i // num_generations.

    collected: with dynamic sampling all that was sampled for it, round by round; [] = this is all.
    staleness: with rollouts ahead, the updates between the weights it was sampled with and those it meets.
    """

    prompts: list[Prompt]
    rollouts: TextRollouts
    texts: list[str]
    scores: Scores
    num_generations: int
    pieces: Pieces | None = None
    collected: list[Experience] = field(default_factory=list)
    staleness: int | None = None

    def metrics(self) -> dict[str, float]:
        """Facts of the batch; see `metrics.METRICS`."""
        rollouts = self.rollouts
        valid_B = rollouts.valid_B
        reward_B = rollouts.reward_BT.sum(1)
        known = reward_B[valid_B].double()
        values_PG, valid_PG = (x_B.view(-1, self.num_generations) for x_B in (reward_B, valid_B))
        most_P = values_PG.masked_fill(~valid_PG, -torch.inf).amax(1)
        uniform_P = most_P <= values_PG.masked_fill(~valid_PG, torch.inf).amin(1)
        out = {
            "reward": float(known.mean()) if len(known) else float("nan"),
            "reward_std": float(known.std()) if len(known) > 1 else 0.0,
            "unscorable": 1 - float(valid_B.double().mean()),
            **{f"failed/{name}": count for name, count in self.scores.failures().items()},
            "uniform_groups": float(uniform_P.double().mean()),
            "completion_length": float(rollouts.length_B.double().mean()),
            "truncated": float(rollouts.truncated_B.double().mean()),
            "tokens": int(rollouts.mask_BT.sum()),
        }
        for name, values in self.scores.parts.items():
            scored = [v for v in values if v is not None]
            out[f"reward/{name}"] = sum(scored) / len(scored) if scored else float("nan")
        told = {name: value for name, value in self.scores.metrics.items() if not name.startswith("rewards/")}
        out.update({f"log/{name}": value for name, value in told.items()})
        if self.staleness is not None:
            out["staleness"] = self.staleness
        return {**out, **self._refilled()}

    def _refilled(self) -> dict[str, float]:
        """What dynamic sampling took, and the reward of the step's own prompts, which the batch's no longer is."""
        if not self.collected:
            return {}
        own = self.collected[0].rollouts
        known = own.reward_BT.sum(1)[own.valid_B].double()
        return {
            "refill_rounds": len(self.collected) - 1,
            "groups_dropped": sum(len(part.prompts) for part in self.collected) - len(self.prompts),
            "sampled_reward": float(known.mean()) if len(known) else float("nan"),
            "tokens": sum(int(part.rollouts.mask_BT.sum()) for part in self.collected),
        }

    def readable(
        self, weight_BT: Tensor, num_groups: int, more: dict[str, Tensor] | None = None
    ) -> list[dict[str, Any]]:
        """The first groups as JSON rows: texts, scores, and the text and numbers of every token.

        more: further numbers of every token, (B, T); null where NaN, and left out of a row that has none. Tokens that
        an environment inserted stand in their place, with null for every number.
        """
        rollouts, rows = self.rollouts, []
        lengths, ids = rollouts.length_B.tolist(), rollouts.context_ids()
        places = rollouts.place_BT().tolist() if rollouts.inserted_B is not None else None

        def told(x_BT: Tensor, row: int) -> list[float]:
            values: list[float] = x_BT[row, : lengths[row]].tolist()
            return values if places is None else _spread(values, places[row], len(ids[row]))

        numbers = {"logp": rollouts.logp_BT, "ref_logp": rollouts.ref_logp_BT, "weight": weight_BT}
        if rollouts.ref_logp_BT is not None:
            numbers["kl"] = k3(rollouts.logp_BT, rollouts.ref_logp_BT)
        for i in range(min(num_groups * self.num_generations, len(self.texts))):
            prompt = self.prompts[i // self.num_generations]
            rows.append(
                {
                    "prompt_index": prompt.index,
                    "group": i // self.num_generations,
                    "prompt": prompt.text,
                    "completion": self.texts[i],
                    "ids": ids[i],
                    "reward": self.scores.reward[i],
                    "parts": {name: values[i] for name, values in self.scores.parts.items()},
                    "truncated": bool(rollouts.truncated_B[i]),
                    **({} if self.staleness is None else {"staleness": self.staleness}),
                    **({} if self.pieces is None else {"pieces": self.pieces(ids[i])}),
                    "tokens": {name: _rounded(told(x, i)) for name, x in numbers.items() if x is not None}
                    | _known({name: told(x, i) for name, x in (more or {}).items()}),
                }
            )
        return rows


def _spread(values: list[float], places: list[int], length: int) -> list[float]:
    """`values` at their places in a row of `length`; NaN elsewhere."""
    spread = [math.nan] * length
    for place, value in zip(places, values, strict=False):
        spread[place] = value
    return spread


def _rounded(values: list[float]) -> list[float | None]:
    return [None if math.isnan(v) else round(v, 5) for v in values]


def _known(numbers: dict[str, list[float]]) -> dict[str, list[float | None]]:
    """NaN as None; what is known of no token is left out."""
    clean = {name: _rounded(values) for name, values in numbers.items()}
    return {name: values for name, values in clean.items() if any(v is not None for v in values)}


class Pieces:
    """The text that each token adds; whole tokens are looked up once, as a step has tens of thousands of them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """Special tokens by name. A character made of several tokens belongs to the last of them."""
        pieces: list[str] = []
        pending: list[int] = []
        for token in ids:
            text = self._alone(token) if not pending else self._decode([*pending, token])
            pending.append(token)
            if text.endswith("\ufffd") and len(pending) < MOST_TOKENS_OF_A_CHARACTER:
                pieces.append("")
                continue
            pieces.append(text)
            pending = []
        if pending:
            pieces[-1] = self._decode(pending)
        return pieces

    def _alone(self, token: int) -> str:
        if token not in self.known:
            text = self._decode([token])
            # SentencePiece writes a leading space as ▁ and drops it when a token is decoded alone.
            spaced = str(self.tokenizer.convert_ids_to_tokens(token)).startswith("▁")
            self.known[token] = f" {text}" if spaced and not text.startswith(" ") else text
        return self.known[token]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


class Collector:
    """Samples and scores.

    Args:
        sampler: an engine. scorer: the reward functions. tokenizer: to read completions.
        params: the training distribution. seed: of the run. gamma: discount per token.
        twins: other readings of the answers, for evaluations.
        reader: from ids to the text that functions read; None = without any special token.
    """

    def __init__(
        self,
        sampler: Sampler,
        scorer: Scorer,
        tokenizer: Any,
        params: SamplingParams,
        *,
        seed: int,
        gamma: float,
        twins: Twins | None = None,
        reader: Reader | None = None,
    ) -> None:
        self.sampler, self.scorer, self.tokenizer, self.params = sampler, scorer, tokenizer, params
        self.seed, self.gamma = seed, gamma
        self.max_steps = 0  # of the run, for reward functions that shape themselves by its progress
        self.pieces = Pieces(tokenizer)
        self.twins = twins
        self.reader = reader or Reader(tokenizer)
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Collector:
        """Start what the engine needs beside this process; `__exit__` ends it."""
        if isinstance(self.sampler, contextlib.AbstractContextManager):
            self._open.enter_context(self.sampler)
        if self.twins is not None:
            self._open.enter_context(self.twins.scorer)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @contextlib.contextmanager
    def part_of_a_step(self, share: float) -> Iterator[None]:
        """Inside the block the completions are this share of a step, whose failures are counted over the whole."""
        self.scorer.share = share
        try:
            yield
        finally:
            self.scorer.share = 1.0

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
            done = self._sample(prompts, num_generations, self.params, TRAIN_STREAM, step, first_place)
            texts, ids = self.read(done)
        with clock("reward"):
            scores = self.score([p for p in prompts for _ in range(num_generations)], texts, ids, step)
        others: dict[str, Tensor] = {}
        if greedy:
            greedy_P = torch.tensor(self._greedy_rewards(prompts, step, clock), dtype=torch.float32)
            greedy_B = greedy_P.to(done.mask_BT.device).repeat_interleave(num_generations)
            others = {"greedy_B": greedy_B.nan_to_num(), "valid_B": ~greedy_B.isnan()}
        unknown = float("nan")
        reward_B = torch.tensor([unknown if r is None else r for r in scores.reward], dtype=torch.float32)
        rollouts = TextRollouts.of_scored_text(
            mask_BT=done.mask_BT,
            logp_BT=done.logp_BT,
            group_B=torch.arange(len(prompts), device=done.mask_BT.device).repeat_interleave(num_generations),
            reward_B=reward_B.to(done.mask_BT.device),
            truncated_B=done.truncated_B,
            gamma=self.gamma,
            tokens_BT=done.tokens_BT,
            prompt_ids_B=[p.ids for p in prompts for _ in range(num_generations)],
            **others,
        )
        return Experience(list(prompts), rollouts, texts, scores, num_generations, self.pieces)

    def _greedy_rewards(self, prompts: Sequence[Prompt], step: int, clock: Clock) -> list[float]:
        """The reward of each prompt's greedy completion, under equal weights always the same; NaN = unscorable."""
        with clock("sample"):
            done = self._sample(prompts, 1, self._greedy, TRAIN_STREAM, step)
            texts, ids = self.read(done)
        with clock("reward"):
            scores = self.score(prompts, texts, ids, step)
        return [float("nan") if r is None else r for r in scores.reward]

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
        done = self._sample(prompts, num_samples, params, EVAL_STREAM, 0, first_place)
        return list(zip(*self.read(done), strict=True))

    def _sample(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        params: SamplingParams,
        stream: int,
        step: int,
        first_place: int | Tensor = 0,
    ) -> Completions:
        keys_B = self.keys(len(prompts), num_generations, stream, step, first_place)
        return self.sampler.sample([p.ids for p in prompts], num_generations, params, keys_B)

    def keys(
        self, num_prompts: int, num_generations: int, stream: int, step: int, first_place: int | Tensor = 0
    ) -> Tensor:
        """The random stream of each row."""
        place_P = first_place if isinstance(first_place, Tensor) else first_place + torch.arange(num_prompts)
        keys_PG = stream_key(self.seed, stream, step, place_P.unsqueeze(1), torch.arange(num_generations))
        return keys_PG.reshape(-1)

    def read(self, done: Completions) -> tuple[list[str], list[list[int]]]:
        lengths = done.mask_BT.sum(1).tolist()
        ids = [row[:n] for row, n in zip(done.tokens_BT.tolist(), lengths, strict=True)]
        return self.reader(ids), ids

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str], ids: Sequence[list[int]], step: int = 0) -> Scores:
        """Rewards in TRL's form: conversational prompts get their completions as a list of one message.

        step: of the run, counted from 1; functions are told how many are done, and 0 in an evaluation.
        """
        return self._scored(self.scorer, prompts, texts, ids, step)

    def readings(
        self, prompts: Sequence[Prompt], texts: Sequence[str], ids: Sequence[list[int]], deciding: list[float | None]
    ) -> dict[str, list[float | None]]:
        """The strict and the lenient score of each completion, where there are both; `deciding` decides a pass."""
        if self.twins is None:
            return {}
        parts = self._scored(self.twins.scorer, prompts, texts, ids).parts
        return {reading: deciding if name is None else parts[name] for reading, name in self.twins.names.items()}

    def _scored(
        self, scorer: Scorer, prompts: Sequence[Prompt], texts: Sequence[str], ids: Sequence[list[int]], step: int = 0
    ) -> Scores:
        given = [p.messages if p.messages is not None else p.text for p in prompts]
        completions = [
            text if p.messages is None else [{"role": "assistant", "content": text}]
            for p, text in zip(prompts, texts, strict=True)
        ]
        state = {"global_step": max(step - 1, 0), "max_steps": self.max_steps}
        return scorer.score(given, completions, list(ids), [p.row for p in prompts], state)
