"""Configs written flat in Python, one class a trainer, as TRL's users write them."""

from __future__ import annotations

from inspect import Parameter, Signature
from typing import Any, ClassVar

from pydantic import PrivateAttr

from .check import DEFAULT_PROMPTS
from .load import ConfigError, check_values, nest
from .schema import LEAVES, Config
from .trl import WORDS, TrlSchedule, translate


class FlatConfig(Config):
    """A Config whose keywords are leaf names, as TRL's configs are written: `GRPOConfig(learning_rate=1e-6)`.

    Arguments of TRL 1.16 are taken, translated or refused (docs/from-trl.md). They are read as TRL's are written:
    `config.learning_rate`, and an argument that has no setting here as it was given, or TRL's default.

    The algorithm is that of the class unless another is named: `GRPOConfig(algorithm="dapo")`, or `name="dapo"`.
    """

    _algorithm: ClassVar[str] = "grpo"
    _schedule: TrlSchedule = PrivateAttr(default_factory=TrlSchedule)
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """The keywords for `help()` and notebooks; editors and type checkers read flat.pyi."""
        first = Parameter("output_dir", Parameter.POSITIONAL_OR_KEYWORD, default=None)
        names = dict.fromkeys([*LEAVES, "algorithm", *WORDS])
        others = [Parameter(name, Parameter.KEYWORD_ONLY, default=...) for name in names if name != "output_dir"]
        cls.__signature__ = Signature([first, *others])

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *LEAVES, *WORDS})

    def __init__(self, output_dir: str | None = None, **values: Any) -> None:
        if output_dir is not None:
            values["output_dir"] = str(output_dir)
        settings, schedule = translate(values)
        nested = nest(settings)
        if isinstance(nested.setdefault("algorithm", {}), dict):
            nested["algorithm"].setdefault("name", type(self)._algorithm)
        config = check_values(nested)
        super().__init__(**{section: getattr(config, section) for section in Config.model_fields})
        self._schedule, self._given = schedule, values

    def __getattr__(self, name: str) -> Any:
        if name in LEAVES:
            return getattr(getattr(self, LEAVES[name]), name)
        if name in WORDS:
            return self._given.get(name, WORDS[name].default)
        return super().__getattr__(name)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "algorithm" and isinstance(value, str):
            self.algorithm.name = value
        elif name in LEAVES and (name not in WORDS or WORDS[name].kind == "supported"):
            setattr(getattr(self, LEAVES[name]), name, value)
        elif name in WORDS:
            raise ConfigError(
                f"{name} cannot be set on a config that is made, since other settings follow from it. Give it when the "
                f"config is made: {type(self).__name__}({name}={value!r})."
            )
        else:
            super().__setattr__(name, value)

    def fit(self, num_rows: int, *, holds_out: bool) -> None:
        """Shrink the defaults of held-out prompts and of the batch to a small dataset; what was given stays."""
        data, train = self.data, self.train
        if holds_out and "num_eval_prompts" not in data.model_fields_set:
            data.num_eval_prompts = min(data.num_eval_prompts, num_rows // 4)
        if not {"prompts_per_step", "gradient_accumulation_steps"} & train.model_fields_set:
            train.prompts_per_step = max(min(DEFAULT_PROMPTS, num_rows - data.num_eval_prompts * holds_out), 1)

    def settle(self, num_prompts: int, prompts_per_step: int) -> None:
        """Count what hangs on the number of prompts: `num_train_epochs`, shares of all steps."""
        self._schedule.settle(self, num_prompts, prompts_per_step)


class ReinforceConfig(FlatConfig):
    """Settings of `ReinforceTrainer`: REINFORCE, reward-to-go, baseline none or running_mean."""

    _algorithm: ClassVar[str] = "reinforce"


class RLOOConfig(FlatConfig):
    """Settings of `RLOOTrainer`: leave-one-out baseline."""

    _algorithm: ClassVar[str] = "rloo"


class GRPOConfig(FlatConfig):
    """Settings of `GRPOTrainer`: group mean and deviation, TRL 1.16's reduction."""

    _algorithm: ClassVar[str] = "grpo"


class ActorCriticConfig(FlatConfig):
    """Settings of `ActorCriticTrainer`: ppo, or a2c by `name="a2c"`, with a learned critic."""

    _algorithm: ClassVar[str] = "ppo"
