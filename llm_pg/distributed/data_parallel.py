"""Whole weights on every rank (DDP): gradients are summed over ranks after the passes of a step, in flat buckets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import BUCKET_BYTES
from .network import end_with_the_machine
from .strategy import Strategy

T = TypeVar("T")


class DataParallel(Strategy):
    """All ranks hold the same weights and each has rows of its own; torch's default process group is there already."""

    def __init__(self, device: torch.device | str, scaler: Any = None) -> None:
        super().__init__(device, scaler)
        self.num_ranks, self.rank = dist.get_world_size(), dist.get_rank()
        self.is_main = self.rank == 0
        end_with_the_machine()

    def prepare(self, policy: Any, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        super().prepare(policy, optimizer, max_grad_norm)
        end_with_the_machine()  # groups may have been made since

    def all_sum(self, x: Tensor) -> Tensor:
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value)
        return values

    @torch.no_grad()
    def _sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        for bucket in buckets(parameters):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = gradients[0].flatten() if len(bucket) == 1 else torch.cat([x.flatten() for x in gradients])
            del gradients
            dist.all_reduce(flat)
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = part.view_as(p)


def buckets(parameters: Iterable[torch.nn.Parameter], most_bytes: int = BUCKET_BYTES) -> list[list[torch.nn.Parameter]]:
    """Parameters in the groups whose gradients travel together: of one type and device, in their order, at most
    `most_bytes` together where it is more than one."""
    out: list[list[torch.nn.Parameter]] = []
    filling: dict[tuple[torch.dtype, torch.device], tuple[list[torch.nn.Parameter], int]] = {}
    for parameter in parameters:
        kind, size = (parameter.dtype, parameter.device), parameter.numel() * parameter.element_size()
        bucket, held = filling.get(kind, ([], most_bytes))
        if held + size > most_bytes:
            bucket, held = [], 0
            out.append(bucket)
        bucket.append(parameter)
        filling[kind] = bucket, held + size
    return out
