"""Settings on a command line, in any of the forms that people write: key=value, --key=value, --key value, --flag."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any, get_args, get_origin

from ..algorithms.table import ALGORITHMS
from ..words import nearest, words_of
from . import schema
from .load import ConfigError

# Names of TRL's ScriptArguments and of transformers for settings that have another name here.
_ALSO = {
    "dataset_train_split": "dataset_split",
    "dataset_test_split": "dataset_eval_split",
    "algorithm": "name",
    "torch_dtype": "dtype",
}
_SETTING = re.compile(r"[A-Za-z_][\w.]*=")


def as_settings(words: Sequence[str], options: Collection[str]) -> list[str]:
    """Returns the words with each `--key value` of a setting as one word `key=value`; all others stay as they are.

    Args:
        words: of a command line after the command's name.
        options: what the command itself understands, such as --resume. A setting of the same name gives way to it.

    A key without a value, at the end or before another option, is true. Where a list is expected, all words up to the
    next option, setting or YAML file belong to it.

    Raises ConfigError for an option that is neither, with the nearest name.
    """
    out: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("--") or word == "--" or name in options:
            out.append(word)
            continue
        key = _key(name, [*options])
        if equals:
            out.append(f"{key}={value}")
        elif _is_list(key):
            out.append(f"{key}={json.dumps(_values(rest)) if len(_ahead(rest)) != 1 else _values(rest)[0]}")
        else:
            out.append(f"{key}={rest.pop(0)}" if _ahead(rest) else f"{key}=true")
    return out


def _key(option: str, options: Sequence[str]) -> str:
    """The setting that an option names."""
    written = option.removeprefix("--")
    section, dot, leaf = written.replace("-", "_").rpartition(".")
    leaf = _ALSO.get(leaf, leaf)
    if leaf in schema.LEAVES and section in ("", schema.LEAVES[leaf]):
        return f"{section}{dot}{leaf}"
    known = [*options, *(f"--{name}" for name in schema.LEAVES)]
    raise ConfigError(
        f"Unknown option {option!r}.{nearest(option, known)} `llm-pg train --help-all` lists every setting; each can "
        "be written key=value or --key value."
    )


def _field(key: str) -> Any:
    leaf = key.rpartition(".")[2]
    section = schema.Config.model_fields[schema.LEAVES[leaf]].annotation
    return section.model_fields[leaf]  # type: ignore[union-attr]


def _is_list(key: str) -> bool:
    annotation = _field(key).annotation
    return any(get_origin(kind) is list for kind in (annotation, *get_args(annotation)))


def _ahead(rest: Sequence[str]) -> list[str]:
    """The words that can be values of the option before them."""
    found: list[str] = []
    for word in rest:
        if word.startswith("--") or _SETTING.match(word) or word.endswith((".yaml", ".yml")):
            break
        found.append(word)
    return found


def _values(rest: list[str]) -> list[str]:
    """Takes the values of a list from the front of `rest`."""
    found = _ahead(rest)
    if not found:
        return ["true"]
    return [rest.pop(0) for _ in found]


# What most runs set, in the order of a screen.
COMMON = {
    "What is trained": ("model_name_or_path", "dtype", "use_peft", "lora_r"),
    "Data": (
        *("task", "dataset_name", "dataset_config", "data_files", "prompt_column", "prompt_template", "system_prompt"),
        *("chat", "extract", "num_eval_prompts"),
    ),
    "Reward": ("reward_funcs", "reward_weights"),
    "A step": (
        *("prompts_per_step", "num_generations", "max_completion_length", "temperature"),
        *("per_device_train_batch_size", "engine"),
    ),
    "Algorithm": ("name", "beta", "epsilon"),
    "Optimiser": ("max_steps", "learning_rate", "lr_scheduler_type", "bf16", "gradient_checkpointing"),
    "The run": ("output_dir", "run_name", "seed", "eval_steps", "save_steps", "report_to", "use_cpu"),
}
WIDTH = 118
MOST_WORDS = 4  # choices that a line of the short help shows


def common_help() -> str:
    """The settings that most runs set, each in a line: name=default, choices, and the first sentence of its meaning."""
    lines = []
    for title, names in COMMON.items():
        lines.append(f"{title}:")
        for leaf in names:
            field = _field(leaf)
            words = _words(leaf, field)
            shown = "|".join([*words[:MOST_WORDS], "..."] if len(words) > MOST_WORDS else words)
            name = {"name": "algorithm"}.get(leaf, leaf)
            description = str(field.description)
            meaning = description.split(". ")[0].split("; ")[0].rstrip(" .,")
            if field.default is None and "None = " in description and "None = " not in meaning:
                meaning += f"; null = {re.split('[.;]', description.split('None = ')[1])[0]}"
            text = f"{{{shown}}} {meaning}" if words else meaning
            begin = f"  {name}={_written(field.default)}"
            room = WIDTH - max(len(begin) + 1, 41)
            lines.append(f"{begin:<40} {text if len(text) <= room else text[: room - 3] + '...'}")
    return "\n".join(lines)


def help_text() -> str:
    """Every setting with its default, its choices and its meaning, by section."""
    lines = []
    for section, field in schema.Config.model_fields.items():
        kind = field.annotation
        assert kind is not None
        lines.append(f"{section}: {(kind.__doc__ or '').strip().splitlines()[0]}")
        for name, leaf in kind.model_fields.items():  # type: ignore[attr-defined]
            lines.append(f"  {name}={_written(leaf.default)}{_choices(name, leaf)}  {leaf.description}")
        lines.append("")
    return "\n".join(lines)


def _written(value: Any) -> str:
    """A default as it is written on a command line."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def _words(name: str, field: Any) -> tuple[str, ...]:
    """The words of which a setting is one; () where it is no word of a list."""
    return tuple(ALGORITHMS) if name == "name" else tuple(words_of(field.annotation))


def _choices(name: str, field: Any) -> str:
    """ " {a|b}" where a setting is one of a few words, else ""."""
    words = _words(name, field)
    return f" {{{'|'.join(words)}}}" if words else ""
