"""Where rows come from: a task of reward_fns, local files, the hub, or Python objects."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterable, Sized
from importlib import import_module
from types import ModuleType
from typing import Any

from ..config import Config, ConfigError, nearest
from .files import read_files
from .hub import read_hub
from .table import Table, article, head, short

HOW = (
    "Give one source of prompts: data.task (a synthetic task), data.dataset_name (a hub dataset), data.data_files "
    "(JSONL, JSON, CSV or Parquet), or train_dataset from Python."
)


def read_sources(config: Config, train_dataset: Any = None, eval_dataset: Any = None) -> tuple[Table, Table | None]:
    """The rows to train on and the rows held out; None for the latter = hold out rows of the former."""
    data = config.data
    given = [name for name in ("task", "dataset_name", "data_files") if getattr(data, name)]
    if train_dataset is not None:
        if given:
            raise ConfigError(f"train_dataset and data.{given[0]} are both given; give one source of prompts.")
        given = ["train_dataset"]
    if not given:
        raise ConfigError(f"No prompts are given. {HOW}")
    held_out = read_held_out(config, eval_dataset)
    cap = data.num_train_prompts + (data.num_eval_prompts if held_out is None else 0)
    if given == ["train_dataset"]:
        train = read_object(train_dataset, "train_dataset", config, cap=cap)
        if held_out is None and _is_datasets(train_dataset, "DatasetDict", "IterableDatasetDict"):
            held_out = _held_out_split(train_dataset, config)
    elif given == ["task"]:
        train, rest = read_task(config, data.num_train_prompts + data.num_eval_prompts).cut(data.num_train_prompts)
        held_out = rest if held_out is None else held_out
    elif given == ["data_files"]:
        train = read_files(data.data_files or [], "data.data_files")
    else:
        train = read_hub(data, data.dataset_split, cap, "num_train_prompts")
    return train, held_out


def read_held_out(config: Config, eval_dataset: Any = None) -> Table | None:
    """The rows held out, where they have a source of their own; else None."""
    data = config.data
    if eval_dataset is not None:
        if data.eval_data_files:
            raise ConfigError("eval_dataset and data.eval_data_files are both given; give one.")
        return read_object(eval_dataset, "eval_dataset", config, cap=data.num_eval_prompts)
    if data.eval_data_files:
        return read_files(data.eval_data_files, "data.eval_data_files")
    if data.dataset_name and data.dataset_eval_split:
        return read_hub(data, data.dataset_eval_split, data.num_eval_prompts, "num_eval_prompts")
    return None


def _task(name: str) -> ModuleType:
    from reward_fns.registry import tasks

    if name not in tasks():
        raise ConfigError(f"There is no task {name!r}; tasks are {', '.join(tasks())}.{nearest(name, tasks())}")
    return import_module(tasks()[name])


def _call_task(name: str, maker: str, seed: int, n: int, options: dict[str, Any], setting: str) -> list[Any]:
    """Rows of the task's `maker`, with its complaints as ConfigError."""
    function = getattr(_task(name), maker)
    known = [key for key in inspect.signature(function).parameters if key not in ("seed", "n")]
    for option in options:
        if option not in known:
            raise ConfigError(
                f"Task {name} has no option {option!r} ({setting}); its options are {', '.join(known)}."
                f"{nearest(option, known)}"
            )
    try:
        return function(seed, n, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"Task {name} cannot make {n} rows with {setting} {options}: {error}") from error


def read_task(config: Config, n: int) -> Table:
    """`n` rows of the synthetic task, a function of the seed."""
    data = config.data
    assert data.task is not None
    rows = _call_task(data.task, "prompts", config.run.seed, n, data.task_options, "data.task_options")
    return Table(f"task {data.task}", rows)


def task_demonstrations(config: Config) -> list[dict[str, str]]:
    """Prompt and completion of every training row of the task, for a warm start; none of a held-out row.

    The rows are cut exactly as `load_prompts` cuts them: row i here answers training prompt i.
    """
    data = config.data
    if data.task is None:
        raise ConfigError("A warm start needs data.task, which makes demonstrations, or warm_start_data_files.")
    options = {**data.task_options, **config.warm_start.warm_start_options}
    n = data.num_train_prompts + data.num_eval_prompts
    rows = _call_task(data.task, "demonstrations", config.run.seed, n, options, "options")
    return rows[: data.num_train_prompts]


def _is_datasets(value: Any, *names: str) -> bool:
    """Whether a value is of these classes of `datasets`, without importing it: whoever made the value did."""
    module = sys.modules.get("datasets")
    return module is not None and isinstance(value, tuple(getattr(module, name) for name in names))


def read_object(value: Any, name: str, config: Config, cap: int) -> Table:
    """Rows of a `datasets` object, a list of dicts or an iterable of them.

    What has a length is read whole; a generator or a streaming dataset is read up to `cap` rows, since it may not end.
    """
    if _is_datasets(value, "DatasetDict", "IterableDatasetDict"):
        split = config.data.dataset_split
        if name == "eval_dataset":
            split = config.data.dataset_eval_split or (next(iter(value)) if len(value) == 1 else "test")
        return read_object(_split(value, split, name), f"{name}[{split!r}]", config, cap)
    if _is_datasets(value, "Dataset"):
        return Table(name, value.with_format(None).to_list())
    if isinstance(value, (str, bytes, os.PathLike)):
        raise ConfigError(
            f"{name} is {article(value)} ({short(value)}). From Python pass rows; a hub dataset or a file is named by "
            "data.dataset_name or data.data_files."
        )
    if isinstance(value, dict) or not isinstance(value, Iterable):
        raise ConfigError(
            f"{name} is {article(value)}. It can be a datasets Dataset, IterableDataset or DatasetDict, a list of "
            "dicts, or a generator of dicts."
        )
    setting = "num_eval_prompts" if name.startswith("eval_dataset") else "num_train_prompts"
    return Table(name, value if isinstance(value, Sized) else head(value, cap, name, setting))


def _split(splits: Any, split: str, name: str) -> Any:
    if split not in splits:
        raise ConfigError(
            f"{name} has no split {split!r}; its splits are {', '.join(map(str, splits))}.{nearest(split, splits)} Set "
            "data.dataset_split and data.dataset_eval_split."
        )
    return splits[split]


def _held_out_split(splits: Any, config: Config) -> Table | None:
    split = config.data.dataset_eval_split
    if split is None:
        return None
    rows = _split(splits, split, "train_dataset")
    return read_object(rows, f"train_dataset[{split!r}]", config, cap=config.data.num_eval_prompts)
