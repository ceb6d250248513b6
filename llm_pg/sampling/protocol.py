"""What a sampler is given and what it returns. Imports no model code, so that every engine can share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..estimators.distributions import warp_logits


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. The trainer applies the same warp to the logits it trains."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    greedy: bool = False
    max_completion_length: int = 256
    stop: tuple[str, ...] = ()

    @property
    def truncates_support(self) -> bool:
        return bool(self.top_k or self.top_p < 1.0 or self.min_p)

    def warp(self, logits: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits of the distribution that is sampled (for greedy: the one the log-probabilities are reported under)."""
        return warp_logits(
            logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, keep=keep
        )


@dataclass
class Completions:
    """What was sampled for B rows.

    tokens_BT: completion ids, right-padded with the pad id. mask_BT: True on each sampled token, the end token
    included. logp_BT: their log-probability under the distribution sampled, float32 nats. truncated_B: True where
    neither the end token nor a stop string came within the length limit.
    """

    tokens_BT: Tensor
    mask_BT: Tensor
    logp_BT: Tensor
    truncated_B: Tensor


class Sampler(Protocol):
    """An engine. Row i of the answer belongs to prompt i // num_generations."""

    def sample(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, params: SamplingParams, keys_B: Tensor
    ) -> Completions:
        """Sample `num_generations` completions of each prompt.

        Args:
            prompt_ids: token ids, one sequence a prompt, none empty.
            num_generations: G >= 1.
            params: the distribution and the limits.
            keys_B: int64 (P·G,): one random stream a row. The same key, prompt and weights give the same completion
                whatever else is in the batch (up to rounding of the logits).
        """
        ...
