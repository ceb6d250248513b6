"""AdamW over what is trained, and the policy's schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import transformers

from ..config import Config
from ..config.schema import TrainConfig
from ..model.precision import HALF


def make_optimizer(
    train: TrainConfig,
    policy: Iterable[torch.nn.Parameter],
    critic: Iterable[torch.nn.Parameter] = (),
    rate: float = 0.0,
) -> torch.optim.AdamW:
    """AdamW with weight decay on the policy's matrices; biases and norms have none, as with transformers' Trainer.

    critic: parameters with a constant learning rate of their own, `rate`, and no decay.

    Raises ValueError where a parameter is of a 16-bit type.
    """
    policy, critic = list(policy), list(critic)
    half = [p for p in (*policy, *critic) if p.dtype in HALF]
    if half:
        dtype = str(half[0].dtype).removeprefix("torch.")
        raise ValueError(
            f"{len(half)} of {len(policy) + len(critic)} trained tensors are {dtype}: "
            "steps of a small learning rate would round to nothing there. Hold them in float32 and compute in 16 bits "
            "by autocast (training.precision.hold_trained_in_float32; a trainer does so by itself)."
        )
    groups: list[dict[str, Any]] = [{"params": policy}]
    if train.weight_decay:
        groups = [
            {"params": [p for p in policy if p.dim() > 1]},
            {"params": [p for p in policy if p.dim() <= 1], "weight_decay": 0.0},
        ]
    if critic:
        groups.append({"params": critic, "lr": rate, "weight_decay": 0.0, "constant": True})
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        weight_decay=train.weight_decay,
        fused=True,
    )


def make_scheduler(config: Config, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
    """The policy's schedule over `num_steps`. The critic keeps its rate, as its targets move while the policy does."""
    train = config.train
    scheduler = transformers.get_scheduler(
        train.lr_scheduler_type,
        optimizer,
        num_warmup_steps=train.warmup_steps,
        num_training_steps=num_steps,
        scheduler_specific_kwargs=train.lr_scheduler_kwargs or None,
    )
    for number, group in enumerate(optimizer.param_groups):
        if group.get("constant"):
            scheduler.lr_lambdas[number] = _constant
            group["lr"] = scheduler.base_lrs[number]
    return scheduler


def _constant(step: int) -> float:
    return 1.0
