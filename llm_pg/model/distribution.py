"""The distribution that is sampled, and therefore trained."""

from __future__ import annotations

from dataclasses import dataclass

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
