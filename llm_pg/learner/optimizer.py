"""The optimiser over what is trained, and the policy's schedule: by transformers' own factories.

The step itself, and clipping, is a matter of where the weights are: `distributed/strategy.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from ..config import Config, ConfigError
from ..config.train import TrainConfig
from ..model.precision import HALF


def make_optimizer(
    train: TrainConfig,
    policy: Iterable[torch.nn.Parameter],
    critic: Iterable[torch.nn.Parameter] = (),
    rate: float = 0.0,
) -> torch.optim.Optimizer:
    """`train.optim` with weight decay on the policy's matrices; biases and norms have none, as with transformers'
    Trainer.

    critic: parameters with a constant learning rate of their own, `rate`, and no decay.

    Raises:
        ValueError: a parameter is of a 16-bit type.
        ConfigError: the optimiser needs a package that is not installed, or `optim_args` has what it does not read.
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
    groups: list[dict[str, Any]] = [{"params": policy, "weight_decay": train.weight_decay}]
    if train.weight_decay:
        groups = [
            {"params": [p for p in policy if p.dim() > 1], "weight_decay": train.weight_decay},
            {"params": [p for p in policy if p.dim() <= 1], "weight_decay": 0.0},
        ]
    if critic:
        groups.append({"params": critic, "lr": rate, "weight_decay": 0.0, "constant": True})
    try:
        kind, arguments = _of_transformers(train, train.optim_args)
        unread = [name for name in _names(train.optim_args) if not _reads(train, name)]
        if unread:
            raise ValueError(f"it reads no {', '.join(unread)} from optim_args ({train.optim_args!r}); leave it out.")
        made: torch.optim.Optimizer = kind([group for group in groups if group["params"]], **arguments)
    except (ImportError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optim={train.optim!r} cannot be had: {' '.join(str(error).split())}") from None
    return made


def _of_transformers(train: TrainConfig, optim_args: str | None) -> tuple[Any, dict[str, Any]]:
    """The class and the arguments that transformers' Trainer would use."""
    from transformers.training_args import OptimizerNames

    names = ("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
    asked = {name: getattr(train, name) for name in names}
    arguments = SimpleNamespace(
        optim=OptimizerNames(train.optim), optim_args=optim_args, optim_target_modules=None, **asked
    )
    return transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)  # type: ignore[arg-type]


def _names(optim_args: str | None) -> list[str]:
    return [each.partition("=")[0].strip() for each in (optim_args or "").split(",") if each.strip()]


def _reads(train: TrainConfig, name: str) -> bool:
    """Whether the optimiser makes something of this argument: transformers leaves out what it does not know."""
    try:
        return _of_transformers(train, f"{name}=?") != _of_transformers(train, None)
    except (TypeError, ValueError, AttributeError, KeyError):  # of "?", which is no number
        return True


def check_optimizer(config: Config) -> None:
    """ConfigError where optimiser or schedule of a config cannot be made, before a model is loaded."""
    optimizer = make_optimizer(config.train, [torch.nn.Parameter(torch.zeros(2, 2))])
    make_scheduler(config, optimizer, max(config.train.max_steps, 2))


def make_scheduler(config: Config, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
    """The policy's schedule over `num_steps`. The critic keeps its rate, as its targets move while the policy does."""
    train = config.train
    try:
        scheduler: Any = transformers.get_scheduler(
            train.lr_scheduler_type,
            optimizer,
            num_warmup_steps=train.warmup_steps,
            num_training_steps=num_steps,
            scheduler_specific_kwargs=train.lr_scheduler_kwargs or None,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"lr_scheduler_type={train.lr_scheduler_type!r} cannot be had with lr_scheduler_kwargs="
            f"{train.lr_scheduler_kwargs!r}: {' '.join(str(error).split())}"
        ) from None
    for number, group in enumerate(optimizer.param_groups):
        if group.get("constant"):
            scheduler.lr_lambdas[number] = _constant
            group["lr"] = scheduler.base_lrs[number]
    return scheduler


def _constant(step: int) -> float:
    return 1.0
