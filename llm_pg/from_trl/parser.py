"""TRL's argument parser over our configs: `TrlParser((ScriptArguments, GRPOConfig, ModelConfig))`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, get_type_hints

import trl
import yaml
from trl.scripts.utils import TrlParser as TheirParser

from ..config.flat import FlatConfig

_NOT_GIVEN: Any = object()


class TrlParser(TheirParser):
    """trl's parser of the command line and of a YAML file, `--config FILE`.

    Where a class is a config of ours, TRL's options are those of the installed TRL, with their types and texts; our own
    settings and the fields of a subclass are options too. The config is made of what is given, by the command line or
    by the file: what is left out keeps our default.

    Args:
        dataclass_types: dataclasses and configs of ours, one or several.
        **kwargs: of argparse's ArgumentParser.
    """

    def __init__(self, dataclass_types: Any = None, **kwargs: Any) -> None:
        one_or_more = dataclass_types if isinstance(dataclass_types, Iterable) else [dataclass_types]
        types = [kind for kind in one_or_more if kind is not None]
        taken = {f.name for kind in types if not issubclass(kind, FlatConfig) for f in dataclasses.fields(kind)}
        shown = {kind: _options_of(kind, taken) for kind in types if issubclass(kind, FlatConfig)}
        super().__init__([shown.get(kind, kind) for kind in types], **kwargs)
        self._configs = {options: kind for kind, options in shown.items()}
        ours = {field.name for options in self._configs for field in dataclasses.fields(options)}
        for action in self._actions:
            if action.dest in ours:
                action.default = _NOT_GIVEN

    def parse_args_into_dataclasses(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """As transformers' HfArgumentParser, with configs of ours in the places of their options."""
        return tuple(self._config_of(each) for each in super().parse_args_into_dataclasses(*args, **kwargs))

    def _config_of(self, parsed: Any) -> Any:
        kind = self._configs.get(type(parsed))
        return parsed if kind is None else kind(**{k: v for k, v in vars(parsed).items() if v is not _NOT_GIVEN})


def _options_of(kind: type[FlatConfig], taken: set[str]) -> type:
    """A dataclass whose fields are the options of a config. taken: options of the script's other classes, which leave
    out a setting of ours of the same name (`dataset_name` of ScriptArguments)."""
    theirs: Any = trl.RLOOConfig if kind._algorithm == "rloo" else trl.GRPOConfig
    hints = {**get_type_hints(theirs), **{name: field.annotation for name, field in kind.own_fields().items()}}
    reported = {field.name: field for field in dataclasses.fields(theirs)}
    made = []
    for field in dataclasses.fields(kind):
        if field.name in hints:
            made.append((field.name, hints[field.name], _same(reported.get(field.name, field))))
        elif field.name not in taken:  # a setting of ours, read as YAML and checked by the config
            made.append((field.name, _as_yaml, dataclasses.field(default=None)))
    return dataclasses.make_dataclass(kind.__name__, made)


def _same(field: Any) -> Any:
    """A field with the same default and text, which is not yet part of a class."""
    return dataclasses.field(default=field.default, default_factory=field.default_factory, metadata=field.metadata)


class _as_yaml:
    """A value as `llm-pg train name=value` reads it."""

    def __new__(cls, text: str) -> Any:
        return yaml.safe_load(text)
