"""Configs written flat in Python, one class a trainer, as TRL's users write them."""

from __future__ import annotations

import dataclasses
from inspect import Parameter, Signature
from typing import Any, ClassVar

from pydantic import PrivateAttr
from pydantic.fields import FieldInfo

from .check import DEFAULT_PROMPTS, resolve_spec
from .load import check_values, nest
from .schema import LEAVES, Config
from .trl import FACTS, WORDS, TrlSchedule, as_dict, as_json, translate

_NAMES = ["output_dir", *(name for name in dict.fromkeys([*WORDS, *LEAVES]) if name != "output_dir")]
# For `dataclasses.fields`, `asdict` and parsers: TRL's configs are dataclasses, and scripts derive from them.
_AsDataclass = dataclasses.make_dataclass("_AsDataclass", [(name, Any, None) for name in _NAMES])


class FlatConfig(Config):
    """A Config whose keywords are leaf names, as TRL's configs are written: `GRPOConfig(learning_rate=1e-6)`.

    Arguments of TRL 1.16 are taken, translated or refused (docs/from-trl.md). They are read as TRL's are written:
    `config.learning_rate`, and an argument that has no setting here as it was given, or TRL's default.

    The algorithm is that of the class unless another is named: `GRPOConfig(algorithm="dapo")`, or `name="dapo"`.

    A subclass may be a dataclass with fields of its own, as with TRL. They belong to the script: no setting of a run
    follows from them, and a run's config.yaml does not have them.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]] = _AsDataclass.__dataclass_fields__
    __dataclass_params__: ClassVar[Any] = _AsDataclass.__dataclass_params__  # type: ignore[attr-defined]
    _algorithm: ClassVar[str] = "grpo"
    _schedule: TrlSchedule = PrivateAttr(default_factory=TrlSchedule)
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """The keywords for `help()` and notebooks; editors and type checkers read flat.pyi."""
        own = cls.own_fields()
        for name, field in own.items():  # pydantic has taken the default off the class, where @dataclass looks for it
            field.exclude = True
            made = {"default_factory": field.default_factory} if field.default_factory else {"default": field.default}
            if not field.is_required() and name not in vars(cls):
                setattr(cls, name, dataclasses.field(**made))  # type: ignore[call-overload]
        if own:
            cls.model_rebuild(force=True)
        if "__init__" not in vars(cls):  # else @dataclass writes one
            cls.__init__ = _init_of(cls)  # type: ignore[method-assign]
        first = Parameter("output_dir", Parameter.POSITIONAL_OR_KEYWORD, default=None)
        names = dict.fromkeys([*LEAVES, "algorithm", *WORDS, *own])
        others = [Parameter(name, Parameter.KEYWORD_ONLY, default=...) for name in names if name != "output_dir"]
        cls.__signature__ = Signature([first, *others])

    @classmethod
    def own_fields(cls) -> dict[str, FieldInfo]:
        """The fields that a script's subclass adds."""
        return {name: field for name, field in cls.model_fields.items() if name not in Config.model_fields}

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *LEAVES, *WORDS, *FACTS})

    def __init__(self, output_dir: str | None = None, **values: Any) -> None:
        if output_dir is not None:
            values["output_dir"] = str(output_dir)
        own = {name: values.pop(name) for name in type(self).own_fields() if name in values}
        config, schedule = self._made(values)
        super().__init__(**{section: getattr(config, section) for section in Config.model_fields}, **own)
        self._schedule, self._given = schedule, values
        self.__post_init__()

    def __post_init__(self) -> None:
        """For subclasses that are dataclasses, which call it."""

    @classmethod
    def _made(cls, values: dict[str, Any]) -> tuple[Config, TrlSchedule]:
        settings, schedule = translate(values)
        nested = nest(settings)
        if isinstance(nested.setdefault("algorithm", {}), dict):
            nested["algorithm"].setdefault("name", cls._algorithm)
        return check_values(nested), schedule

    def __getattr__(self, name: str) -> Any:
        if name in LEAVES:
            value = getattr(getattr(self, LEAVES[name]), name)
            if value is None and LEAVES[name] == "algorithm":  # left to the algorithm
                value = getattr(resolve_spec(self), name, None)
            return value
        if name in WORDS:
            return self._given.get(name, WORDS[name].default)
        if name in FACTS:
            return FACTS[name](self)
        return super().__getattr__(name)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).own_fields():
            super().__setattr__(name, value)
        elif name == "algorithm" and isinstance(value, str):
            self.algorithm.name = value
        elif name in LEAVES and (name not in WORDS or WORDS[name].kind == "supported"):
            setattr(getattr(self, LEAVES[name]), name, value)
            self._given[name] = value
        elif name in WORDS:
            self._give(name, value)
        else:
            super().__setattr__(name, value)

    def _give(self, name: str, value: Any) -> None:
        """Take an argument of TRL's that other settings follow from, as if it had been given when this was made."""
        given = {**self._given, name: value}
        (before, _), (after, schedule) = self._made(dict(self._given)), self._made(dict(given))
        for leaf, section in LEAVES.items():
            then, now = (getattr(getattr(config, section), leaf) for config in (before, after))
            if then != now:
                setattr(getattr(self, section), leaf, now)
        self._schedule, self._given = schedule, given

    def to_dict(self) -> dict[str, Any]:
        """The settings by their flat names; secrets by their names alone."""
        return as_dict(self, [*_NAMES, *type(self).own_fields()])

    def to_json_string(self) -> str:
        """The same as JSON."""
        return as_json(self.to_dict())

    def to_sanitized_dict(self) -> dict[str, Any]:
        """The same with texts for what is no number, text or bool, as trackers take it."""
        simple = (bool, int, float, str)
        return {name: value if isinstance(value, simple) else str(value) for name, value in self.to_dict().items()}

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


def _init_of(cls: type[FlatConfig]) -> Any:
    """An __init__ that is the class's own, which calls that of its base."""

    def __init__(self: Any, output_dir: str | None = None, **values: Any) -> None:
        super(cls, self).__init__(output_dir, **values)

    return __init__


class ReinforceConfig(FlatConfig):
    """Settings of `ReinforceTrainer`: REINFORCE, reward-to-go, baseline none or running_mean."""

    _algorithm: ClassVar[str] = "reinforce"


class RLOOConfig(FlatConfig):
    """Settings of `RLOOTrainer`: leave-one-out baseline."""

    _algorithm: ClassVar[str] = "rloo"

    @classmethod
    def _made(cls, values: dict[str, Any]) -> tuple[Config, TrlSchedule]:
        if values.get("sync_ref_model"):  # it asks for a reference, which TRL's weight of the KL brings
            values = {"beta": WORDS["beta"].rloo, **values}
        return super()._made(values)


class GRPOConfig(FlatConfig):
    """Settings of `GRPOTrainer`: group mean and deviation, TRL 1.16's reduction."""

    _algorithm: ClassVar[str] = "grpo"


class ActorCriticConfig(FlatConfig):
    """Settings of `ActorCriticTrainer`: ppo, or a2c by `name="a2c"`, with a learned critic."""

    _algorithm: ClassVar[str] = "ppo"
