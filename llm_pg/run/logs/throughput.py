"""How close a step comes to the machine: the work that its tokens need, over what the machine was seen to do."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...distributed.tensors import shape_of
from ...model.attention import core_of
from ...rollouts import distinct

SIDE = {"cpu": 1024}  # of the square matrices that are multiplied to measure a device
SIDE_OTHERWISE = 8192
REPEATS = 5


@functools.cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of a few products of square matrices: what this machine does, not what a data sheet says.

    Measured once in a process. A CPU gives its number of threads at that time; about 0.1 s.
    """
    n = SIDE.get(device.type, SIDE_OTHERWISE)
    a, b = torch.ones(n, n, device=device, dtype=dtype), torch.ones(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(REPEATS):
        wait(device)
        begin = time.perf_counter()
        a @ b
        wait(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Work:
    """FLOPs of training on a batch.

    A token costs 2 FLOPs a weight forward and 2 for its gradient; 2 more for the gradient of the weights that are
    trained (all, or an adapter's). Attention's own products are left out, as is what gradient checkpointing computes
    again: this is model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311), which a slower layout does not
    raise.

    Args:
        model: its linear layers are counted, the output layer once. rate: FLOP/s of the machine.
    """

    def __init__(self, model: Any, rate: float) -> None:
        self.rate = rate
        linears = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear)}
        head = core_of(model).get_output_embeddings()
        if head is not None:
            linears[id(head.weight)] = head.weight
        self.weights = sum(math.prod(shape_of(w)) for w in linears.values())
        self.trained = sum(math.prod(shape_of(w)) for w in linears.values() if w.requires_grad)

    def flops(self, tokens: int) -> float:
        """Of a forward and a backward pass over `tokens`."""
        return float(tokens) * (4 * self.weights + 2 * self.trained)

    def utilisation(self, tokens: int, seconds: float) -> float:
        """Share of the machine's rate that the passes over `tokens` came to, in 0..1."""
        return self.flops(tokens) / (max(seconds, 1e-9) * self.rate)


def tokens_to_train(prompt_ids_B: Sequence[tuple[int, ...]], num_completion_tokens: int) -> int:
    """Tokens that must be computed: each distinct prompt once, each completion token once."""
    return sum(len(prompt) for prompt in distinct(prompt_ids_B)[0]) + num_completion_tokens
