"""Configs written flat in Python, one class a trainer, as TRL's users write them."""

from __future__ import annotations

from typing import Any, ClassVar

from .load import check_values
from .schema import Config


class _FlatConfig(Config):
    """A Config whose keywords are leaf names, as TRL's configs are written: `GRPOConfig(learning_rate=1e-6)`."""

    _algorithm: ClassVar[str] = "grpo"

    def __init__(self, output_dir: str | None = None, **values: Any) -> None:
        if output_dir is not None:
            values["output_dir"] = output_dir
        values.setdefault("name", type(self)._algorithm)
        checked = check_values(values)
        super().__init__(**{section: getattr(checked, section) for section in Config.model_fields})


class ReinforceConfig(_FlatConfig):
    """Settings of `ReinforceTrainer`: REINFORCE, reward-to-go, baseline none or running_mean."""

    _algorithm: ClassVar[str] = "reinforce"


class RLOOConfig(_FlatConfig):
    """Settings of `RLOOTrainer`: leave-one-out baseline."""

    _algorithm: ClassVar[str] = "rloo"


class GRPOConfig(_FlatConfig):
    """Settings of `GRPOTrainer`: group mean and deviation, TRL 1.16's reduction."""

    _algorithm: ClassVar[str] = "grpo"


class ActorCriticConfig(_FlatConfig):
    """Settings of `ActorCriticTrainer`: ppo, or a2c by `name="a2c"`, with a learned critic."""

    _algorithm: ClassVar[str] = "ppo"
