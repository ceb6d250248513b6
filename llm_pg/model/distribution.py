"""The distribution that is sampled, and therefore trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..device import to_device
from ..estimators.distributions import warp_logits
from ..rollouts import TextRollouts


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. The trainer applies the same warp to the logits it trains."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    greedy: bool = False
    max_completion_length: int = 256
    stop: tuple[str, ...] = ()

    @property
    def truncates_support(self) -> bool:
        return bool(self.top_k or self.top_p < 1.0 or self.min_p)

    @property
    def reads_context(self) -> bool:
        """Whether the distribution depends on which tokens were there before, beside what the model makes of them."""
        return self.repetition_penalty != 1.0

    def warp(self, logits: Tensor, keep: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """Logits of the distribution that is sampled (for greedy: the one the log-probabilities are reported under)."""
        return warp_logits(
            logits,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            keep=keep,
            repetition_penalty=self.repetition_penalty,
            seen=seen,
        )


@dataclass
class Contexts:
    """What was there before each of M sampled tokens: the first `length_M` ids of the row `row_M` of `ids_RC`."""

    ids_RC: Tensor
    row_M: Tensor
    length_M: Tensor

    @classmethod
    def of_sampled(cls, rollouts: TextRollouts) -> Contexts:
        """Of the sampled tokens in the order of the mask: the prompt, and what was sampled and inserted after it."""
        rows = [(*prompt, *ids) for prompt, ids in zip(rollouts.prompt_ids_B, rollouts.context_ids(), strict=True)]
        width = max(map(len, rows))
        ids_RC = torch.tensor([row + (0,) * (width - len(row)) for row in rows])
        mask_BT = rollouts.on_host("mask_BT")
        length_BT = rollouts.place_BT() + torch.tensor([len(ids) for ids in rollouts.prompt_ids_B]).unsqueeze(1)
        row_M = mask_BT.nonzero()[:, 0]
        return cls(*(to_device(x, rollouts.mask_BT.device) for x in (ids_RC, row_M, length_BT[mask_BT])))

    def part(self, part: slice) -> Contexts:
        return Contexts(self.ids_RC, self.row_M[part], self.length_M[part])

    def seen(self, vocabulary: int) -> Tensor:
        """Which tokens are in each context, bool (M, V)."""
        before_MC = torch.arange(self.ids_RC.shape[1], device=self.ids_RC.device) < self.length_M.unsqueeze(1)
        ids_MC = self.ids_RC[self.row_M].masked_fill(~before_MC, vocabulary)  # one column more takes the others
        seen = torch.zeros(len(ids_MC), vocabulary + 1, dtype=torch.bool, device=ids_MC.device)
        return seen.scatter_(1, ids_MC, True)[:, :vocabulary]
