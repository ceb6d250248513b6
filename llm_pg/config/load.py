"""From YAML, command line and keywords to a checked Config; every complaint is one paragraph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from ..words import nearest
from . import schema
from .check import check_config
from .section import Section

try:  # ten times as fast, where PyYAML was built with it
    from yaml import CSafeLoader as _Loader
except ImportError:
    from yaml import SafeLoader as _Loader  # type: ignore[assignment]


class ConfigError(ValueError):
    """A setting that cannot work; the message says which, what was given and what to do."""


def nest(values: dict[str, Any]) -> dict[str, Any]:
    """Sections from a mapping of sections, dotted keys and unique leaf names.

    Raises:
        ConfigError: a name that is not known, or a setting that is given twice with different values.
    """
    sections = schema.Config.model_fields
    out: dict[str, Any] = {}
    given_as: dict[tuple[str, str], str] = {}

    def put(section: str, leaf: str, value: Any, key: str) -> None:
        found = _section(out, section)
        if leaf in found and found[leaf] != value:
            raise ConfigError(
                f"{section}.{leaf} is given twice: {found[leaf]!r} (as {given_as[section, leaf]}) and {value!r} (as "
                f"{key}). Leave one of them out."
            )
        found[leaf], given_as[section, leaf] = value, key

    for key, value in values.items():
        if not isinstance(key, str):
            raise ConfigError(f"Unknown setting {key!r} (given {value!r}); names of settings are words.")
        if isinstance(value, Section):
            value = value.model_dump(exclude_unset=True)
        if key == "algorithm" and isinstance(value, str):
            put("algorithm", "name", value, key)
        elif key in sections and not isinstance(value, dict):
            out[key] = value
        elif key in sections:
            _section(out, key)
            for leaf, each in value.items():
                put(key, leaf, each, f"{key}.{leaf}")
        elif "." in key:
            section, leaf = key.split(".", 1)
            if section not in sections:
                raise ConfigError(
                    f"Unknown section {section!r} in {key!r}; sections are {', '.join(sections)}."
                    f"{nearest(section, sections)}"
                )
            put(section, leaf, value, key)
        elif key in schema.LEAVES:
            put(schema.LEAVES[key], key, value, key)
        else:
            known = [*sections, *schema.LEAVES]
            raise ConfigError(
                f"Unknown setting {key!r} (given {value!r}).{nearest(key, known)} "
                "`llm-pg train --help-all` lists every setting."
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
    return checked(config)


def checked(config: schema.Config) -> schema.Config:
    """The config, checked as a whole; ConfigError with one paragraph where it cannot work."""
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
    what = first["msg"].removeprefix("Value error, ").rstrip(".?")
    mark = "?" if first["msg"].endswith("?") else "."
    return f"Setting {path!r} cannot be {first['input']!r}: {what[0].lower()}{what[1:]}{mark}{more}"


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


class _OneAnswer(_Loader):
    """YAML whose mappings have each key once: PyYAML keeps the last of several without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                lines = f"{seen[key.value].start_mark.line + 1} and {key.start_mark.line + 1}"
                raise yaml.MarkedYAMLError(None, None, f"{key.value!r} is given twice, in lines {lines}", None)
            if isinstance(key, yaml.ScalarNode):
                seen[key.value] = key
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        there = f" In {path.parent} there are {', '.join(beside)}." if beside else ""
        raise ConfigError(f"There is no config file {str(path)!r}.{nearest(path.name, beside)}{there}")
    try:
        values = _OneAnswer(path.read_text(encoding="utf-8")).get_single_data() or {}
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
    """Returns the checked Config of a YAML file with overrides; torch is not imported.

    Args:
        path: the YAML file; None = defaults.
        overrides: words `key=value`; the last one of a key counts, so that a script can append its own.

    Raises:
        ConfigError: a setting that is unknown, wrong, or cannot work with the others.
    """
    values = nest(read_yaml(path)) if path is not None else {}
    given = nest(dict(parse_override(text) for text in overrides))
    return check_values(merge(values, given))


def check_model(config: schema.ModelConfig) -> None:
    """Is there a model at all? Raises ConfigError."""
    name = config.model_name_or_path
    if config.make is not None:
        if "model_type" not in config.make:
            raise ConfigError("model.make needs model_type (llama, qwen2, ...) beside the sizes of the model.")
        return
    if not name:
        raise ConfigError(
            "No model is named: set model.model_name_or_path to a hub id or a local folder, or model.make to make a "
            "small one."
        )
    path = Path(name).expanduser()
    looks_local = path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not (path / "config.json").is_file():
        what = "is no folder" if not path.is_dir() else "holds no config.json"
        raise ConfigError(f"model_name_or_path {name!r} {what}: give a folder written by save_pretrained, or a hub id.")
