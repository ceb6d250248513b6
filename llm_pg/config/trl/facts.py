"""What scripts read of TRL's arguments that is no argument: the process, its device, the settings as a dict."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from typing import Any


def _rank(name: str) -> int:
    return int(os.environ.get(name, "0"))


def _device(args: Any) -> Any:
    import torch

    if not args.use_cpu and torch.cuda.is_available():
        return torch.device("cuda", _rank("LOCAL_RANK"))
    return torch.device("cpu")


def _num_devices(args: Any) -> int:
    """1 with an accelerator, since a process has one; 0 on the CPU, as in transformers."""
    return int(_device(args).type != "cpu")


def _log_level(args: Any) -> Callable[[], int]:
    """As a method: the level of transformers' logger where `log_level` is passive."""

    def level() -> int:
        from transformers.utils import logging

        word = args.log_level if args.should_log else args.log_level_replica
        return int(logging.log_levels.get(word, logging.get_verbosity()))

    return level


def _warmup(args: Any) -> Callable[[int], int]:
    def steps(num_training_steps: int) -> int:
        share = args.train.warmup_steps
        return math.ceil(share * num_training_steps) if 0 < share < 1 else int(share)

    return steps


def _state(args: Any) -> Any:
    from accelerate import PartialState

    return PartialState(cpu=args.use_cpu)


FACTS: dict[str, Callable[[Any], Any]] = {
    "device": _device,
    "n_gpu": _num_devices,
    "world_size": lambda _: int(os.environ.get("WORLD_SIZE", "1")),
    "process_index": lambda _: _rank("RANK"),
    "local_process_index": lambda _: _rank("LOCAL_RANK"),
    "should_save": lambda _: _rank("RANK") == 0,
    "should_log": lambda _: _rank("RANK") == 0,
    "distributed_state": _state,
    "train_batch_size": lambda args: args.per_device_train_batch_size,
    "get_process_log_level": _log_level,
    "get_warmup_steps": _warmup,
}


def as_dict(args: Any, names: list[str]) -> dict[str, Any]:
    """The settings by their flat names, as JSON holds them; secrets by their names alone, as transformers does."""
    out = {name: getattr(args, name) for name in names}
    return {name: f"<{name.upper()}>" if name.endswith("_token") and value else value for name, value in out.items()}


def as_json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, default=str)
