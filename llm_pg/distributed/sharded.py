"""Weights, gradients or moments in parts over the ranks: what FSDP2 and DeepSpeed's ZeRO have in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import ConfigError
from .data_parallel import DataParallel
from .tensors import collect


class Sharded(DataParallel):
    """A pass with a gradient is an exchange between all ranks, so that all make the same number of passes."""

    sharded = True

    def prepare(self, policy: Any, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        """ConfigError where the optimiser has other moments than AdamW, which alone are divided here."""
        if type(optimizer) is not torch.optim.AdamW:
            raise ConfigError(
                f"Moments in parts over the ranks are those of AdamW, and {type(optimizer).__name__} has others: set "
                "optim=adamw_torch_fused, or launch with DDP."
            )
        super().prepare(policy, optimizer, max_grad_norm)

    def idle_passes(self, passes: int) -> int:
        most = torch.tensor(passes, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most) - passes

    def state_dict(self, model: Any, names: Collection[str] | None = None) -> dict[str, Tensor] | None:
        if not self.shards_weights:
            return None
        held = model.state_dict(keep_vars=True)
        return self.collect(held if names is None else {name: held[name] for name in names})

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return collect(tensors, self.is_main)


def check_reference(policy: Any) -> None:
    """ConfigError where weights in parts would leave no reference."""
    if policy.start is not None:
        raise ConfigError(
            "beta is above 0, the weights are to be cut over the ranks, and the model with its adapter switched "
            "off is not the policy as it is now (the adapter was trained before, or begins as a part of the "
            "weights, as with init_lora_weights='pissa'): a copy of it cannot be put in place there. Give a model "
            "without an adapter and a new one that begins by changing nothing, or set beta=0."
        )
