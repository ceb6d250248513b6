"""What a sampler is given and what it returns. Imports no model code, so that every engine can share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..model.distribution import SamplingParams

__all__ = ["Completions", "SamplingEngine", "SamplingParams", "joined"]


@dataclass
class Completions:
    """What was sampled for B rows.

    Attributes:
        tokens_BT: completion ids, right-padded with the pad id.
        mask_BT: True on each sampled token, the end token included.
        logp_BT: their log-probability under the distribution sampled, float32, nats.
        truncated_B: True where neither the end token nor a stop string came within the length limit.
    """

    tokens_BT: Tensor
    mask_BT: Tensor
    logp_BT: Tensor
    truncated_B: Tensor


def joined(parts: Sequence[Completions], pad_id: int) -> Completions:
    """The rows of several batches below each other, padded to the longest."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.tokens_BT.shape[1] for part in parts)

    def wide(x: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(x, (0, width - x.shape[1]), value=fill)

    return Completions(
        torch.cat([wide(part.tokens_BT, pad_id) for part in parts]),
        torch.cat([wide(part.mask_BT, False) for part in parts]),
        torch.cat([wide(part.logp_BT, 0.0) for part in parts]),
        torch.cat([part.truncated_B for part in parts]),
    )


class SamplingEngine(Protocol):
    """An engine. Row i of the answer belongs to prompt i // num_generations.

    One that needs more than this process is a context manager too, and is open while it samples. What else it can do
    it says in an attribute `capabilities` (`llm_pg.config.engines`); without one it can do nothing else.
    """

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
