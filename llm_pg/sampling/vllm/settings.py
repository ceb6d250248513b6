"""Where vLLM runs and how it is asked, with the tolerance of its check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# Mean |Δ log-probability|, nats a token: rounding stays below, weights of another step are above (in half precision a
# small step hides in the rounding).
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
TOLERANCE_OTHERWISE = 0.05


@dataclass(frozen=True)
class Settings:
    """How vLLM is found or started.

    urls: servers that already run; none = start one here. python: of an environment with vllm, to start it. dtype: of
    the served weights; None = the model's. options: further flags of vLLM. start_timeout: seconds until it answers.
    request_timeout: seconds for one prompt's completions. tolerance: None = by dtype. colocated: no server, vLLM in
    this process. sleep: a colocated one gives back its device's memory whenever it has sampled. adapters: servers get
    the adapter alone.
    """

    urls: Sequence[str] = ()
    python: str | None = None
    dtype: torch.dtype | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    start_timeout: float = 240.0
    request_timeout: float = 600.0
    tolerance: float | None = None
    colocated: bool = False
    sleep: bool = False
    adapters: bool = False

    def tolerance_of(self, dtype: torch.dtype) -> float:
        """The mean gap, nats a token, from which weights count as others."""
        return TOLERANCE.get(dtype, TOLERANCE_OTHERWISE) if self.tolerance is None else self.tolerance


def name_of(dtype: torch.dtype) -> str:
    """As vLLM and checkpoints call it: float32, bfloat16."""
    return str(dtype).removeprefix("torch.")
