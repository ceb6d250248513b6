"""From YAML, command line and keywords to a checked Config; every complaint is one paragraph."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from . import schema
from .check import check_config


class ConfigError(ValueError):
    """A setting that cannot work; the message says which, what was given and what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the nearest of the known words, or ''."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def nest(values: dict[str, Any]) -> dict[str, Any]:
    """Sections from a mapping of sections, dotted keys and unique leaf names."""
    sections = schema.Config.model_fields
    out: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise ConfigError(f"Unknown setting {key!r} (given {value!r}); names of settings are words.")
        if key == "algorithm" and isinstance(value, str):
            key, value = "name", value
        if key in sections and not isinstance(value, dict):
            out[key] = value
        elif key in sections:
            _section(out, key).update(value)
        elif "." in key:
            section, leaf = key.split(".", 1)
            if section not in sections:
                raise ConfigError(
                    f"Unknown section {section!r} in {key!r}; sections are {', '.join(sections)}."
                    f"{nearest(section, sections)}"
                )
            _section(out, section)[leaf] = value
        elif key in schema.LEAVES:
            _section(out, schema.LEAVES[key])[key] = value
        else:
            known = [*sections, *schema.LEAVES]
            raise ConfigError(
                f"Unknown setting {key!r} (given {value!r}).{nearest(key, known)} "
                "`llm-pg train --help` lists every setting."
            )
    return out


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.setdefault(name, {})
    if not isinstance(found, dict):
        raise ConfigError(f"{name!r} is a section and was given as {found!r}; give its settings by their own names.")
    return found


def check_values(values: dict[str, Any]) -> schema.Config:
    """A Config of these values, checked as a whole; ConfigError with one paragraph otherwise."""
    try:
        config = schema.Config(**nest(values))
    except ValidationError as error:
        raise ConfigError(_paragraph(error)) from None
    try:
        check_config(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return config


def _paragraph(error: ValidationError) -> str:
    first, rest = error.errors()[0], len(error.errors()) - 1
    path = ".".join(str(part) for part in first["loc"])
    more = f" ({rest} more such {'problems' if rest > 1 else 'problem'} follow.)" if rest else ""
    if first["type"] == "extra_forbidden":
        section = str(first["loc"][0])
        leaf = str(first["loc"][-1])
        field = schema.Config.model_fields.get(section)
        leaves = list(field.annotation.model_fields) if field and field.annotation else []  # type: ignore[union-attr]
        hint = nearest(leaf, leaves) or nearest(leaf, schema.LEAVES)
        where = f" It belongs to section {schema.LEAVES[leaf]!r}." if leaf in schema.LEAVES else hint
        return f"Unknown setting {path!r} (given {first['input']!r}).{where}{more}"
    return f"Setting {path!r} cannot be {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}.{more}"


def parse_override(text: str) -> tuple[str, Any]:
    """`key=value` of the command line; the value is read as YAML (`1e-5` becomes a number by the field's type)."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"Cannot read {text!r}: a setting on the command line is written key=value.")
    key = key.strip().removeprefix("--")
    try:
        found = yaml.safe_load(value) if value else None
    except (yaml.YAMLError, TypeError) as error:  # PyYAML raises TypeError where a key of a mapping is a mapping
        if _is_text(key):
            return key, value
        raise ConfigError(f"Cannot read the value in {text!r}: {' '.join(str(error).split())}.") from None
    return key, found if found is None or isinstance(found, str) or not _is_text(key) else value


def _is_text(key: str) -> bool:
    """Whether a setting can be nothing but text, which is then taken as it is written: `prompt_template={question}`."""
    leaf = key.rpartition(".")[2]
    section = schema.Config.model_fields.get(schema.LEAVES.get(leaf, ""))
    if section is None or section.annotation is None:
        return False
    annotation = section.annotation.model_fields[leaf].annotation  # type: ignore[attr-defined]
    return annotation is str or set(get_args(annotation)) == {str, type(None)}


def read_yaml(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        there = f" In {path.parent} there are {', '.join(beside)}." if beside else ""
        raise ConfigError(f"There is no config file {str(path)!r}.{nearest(path.name, beside)}{there}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not plain YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings (key: value), and holds a {type(values).__name__}.")
    return values


def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """Two nested mappings; where both name a setting, `high` wins. Dicts below a section are replaced whole."""
    out = {section: dict(values) if isinstance(values, dict) else values for section, values in low.items()}
    for section, values in high.items():
        if isinstance(values, dict) and isinstance(out.get(section), dict):
            out[section].update(values)
        else:
            out[section] = values
    return out


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> schema.Config:
    """The checked Config of a YAML file with `key=value` overrides. Raises ConfigError, before torch is imported."""
    values = nest(read_yaml(path)) if path is not None else {}
    given = nest(dict(parse_override(text) for text in overrides))
    return check_values(merge(values, given))
