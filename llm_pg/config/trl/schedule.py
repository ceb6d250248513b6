"""Counts that only the number of prompts decides: epochs, shares of all steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..schema import Config

_SECTION = {"logging_steps": "run", "save_steps": "run", "eval_steps": "eval", "warmup_steps": "train"}


@dataclass
class TrlSchedule:
    """What is left to count when the data are read.

    Args:
        epochs: passes over the prompts that `max_steps` is computed from; None = it is given.
        every_epoch: settings (of `logging_steps`, `save_steps`, `eval_steps`) that become the steps of an epoch.
        shares: settings (of those and `warmup_steps`) that are a share of all steps.
    """

    epochs: float | None = None
    every_epoch: list[str] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)

    def settle(self, config: Config, num_prompts: int, prompts_per_step: int) -> None:
        """Write the counts into the config. An epoch leaves out the prompts that do not fill a step, as TRL's does."""
        epoch = max(num_prompts // prompts_per_step, 1)
        if self.epochs is not None:
            config.train.max_steps = max(math.ceil(self.epochs * epoch), 1)
        counts = dict.fromkeys(self.every_epoch, epoch)
        counts.update({name: math.ceil(share * config.train.max_steps) for name, share in self.shares.items()})
        for name, count in counts.items():
            section: Any = getattr(config, _SECTION[name])
            setattr(section, name, max(count, 1))
