"""What vLLM is asked of one prompt, and its answer, read with suspicion: what is wrong here would be trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..protocol import SamplingParams
from .errors import EngineError, Unreachable

ROUNDING = 1e-3  # a log-probability may exceed 0 by this


@dataclass(frozen=True)
class Answer:
    """One completion: its ids, their log-probabilities, and whether the server ended it (not the length limit)."""

    ids: list[int]
    logp: list[float]
    ended: bool


@dataclass(frozen=True)
class Ask:
    """The `count` completions of one prompt that are wanted.

    num_tokens: of the model's vocabulary. seed: of the group. salt: names the weights in a server's prefix cache.
    """

    prompt: Sequence[int]
    count: int
    params: SamplingParams
    eos_ids: Sequence[int]
    num_tokens: int
    seed: int
    salt: str

    def body(self) -> dict[str, Any]:
        return request(self.prompt, self.count, self.params, self.eos_ids, self.seed, self.salt)

    def read(self, answer: Any) -> list[Answer]:
        return read(answer, self.prompt, self.count, self.params, self.eos_ids, self.num_tokens)


def request(
    prompt: Sequence[int], count: int, params: SamplingParams, eos_ids: Sequence[int], seed: int, salt: str
) -> dict[str, Any]:
    """The body of /v1/completions. Every setting of the distribution is sent: a server has defaults of its own."""
    return {
        "prompt": list(prompt),
        "n": 1 if params.greedy else count,
        "max_tokens": params.max_completion_length,
        "temperature": 0.0 if params.greedy else params.temperature,
        "top_k": 0 if params.greedy else params.top_k,
        "top_p": 1.0 if params.greedy else params.top_p,
        "min_p": 0.0 if params.greedy else params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        "stop": list(params.stop),
        "stop_token_ids": list(eos_ids),
        "ignore_eos": True,  # the ids above are all that end a completion
        "logprobs": 0,
        "return_token_ids": True,
        "cache_salt": salt,  # a prefix computed with other weights must not be found again
    }


def read(
    answer: Any, prompt: Sequence[int], count: int, params: SamplingParams, eos_ids: Sequence[int], num_tokens: int
) -> list[Answer]:
    """`count` completions. EngineError where the server cannot be trained with; Unreachable where it gave up."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise Unreachable(f"an answer without completions: {str(answer)[:200]}")
    asked = 1 if params.greedy else count
    if sorted(choice.get("index", -1) for choice in choices) != list(range(asked)):
        raise EngineError(f"vLLM gave {len(choices)} completions of a prompt where {asked} were asked for.")
    choices.sort(key=lambda choice: choice["index"])
    if choices[0].get("prompt_token_ids", list(prompt)) != list(prompt):
        raise EngineError(
            "vLLM completed another prompt than the one it was given (prompt_token_ids differ): "
            f"sent {list(prompt)[:8]}..., got {choices[0]['prompt_token_ids'][:8]}.... Look for something between "
            "the trainer and the server that changes requests."
        )
    done = [_completion(choice, params, eos_ids, num_tokens) for choice in choices]
    return done * count if params.greedy else done


def _completion(choice: dict[str, Any], params: SamplingParams, eos_ids: Sequence[int], num_tokens: int) -> Answer:
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise Unreachable(f"a completion ended by {reason!r}")
    ids = choice.get("token_ids")
    logp = (choice.get("logprobs") or {}).get("token_logprobs")
    if not ids or not logp:
        what = "token ids" if not ids else "log-probabilities"
        raise EngineError(
            f"vLLM gave a completion without {what}. The engine needs return_token_ids and logprobs of "
            "/v1/completions, which vLLM 0.32 has; is an older server, or another program, at this address?"
        )
    if len(ids) > params.max_completion_length or any(
        not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < num_tokens for i in ids
    ):
        raise EngineError(
            f"vLLM gave completion ids that this model has not: {len(ids)} ids, the largest {max(ids)}, "
            f"where the model has {num_tokens} tokens and max_completion_length is {params.max_completion_length}. "
            "Does it serve another model?"
        )
    if any(i in eos_ids for i in ids[:-1]):
        raise EngineError("vLLM went on after an end token. It must honour stop_token_ids.")
    if len(logp) != len(ids) or any(
        not isinstance(x, (int, float)) or not math.isfinite(x) or x > ROUNDING for x in logp
    ):
        raise EngineError(
            f"vLLM gave {len(logp)} log-probabilities for {len(ids)} tokens, or one that is no number of at "
            "most 0. A run cannot be trained on them."
        )
    return Answer(list(ids), [min(float(x), 0.0) for x in logp], reason == "stop")
