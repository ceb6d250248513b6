"""The two entry points: `check_data` before anything is loaded, `load_prompts` when there is a tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ..config import Config, ConfigError
from ..config.check import plan_batch
from .encode import encode
from .files import read_files
from .prompt import Prompt, log
from .rows import Draft, check_settings, draft_prompts
from .sources import read_held_out, read_sources
from .stream import check_enough, permutation
from .table import DataRow, Table

CheckRows = Callable[[Sequence[DataRow], Callable[[int], str]], None]


def check_data(config: Config, *, read_hub: bool = False, check_rows: CheckRows | None = None) -> list[str] | None:
    """Returns the columns that reward functions will receive, once the whole data has been read and found usable.

    None where they are not known yet: a hub dataset is read here with `read_hub` alone, which may download it and
    imports datasets. Otherwise neither torch nor datasets is imported (pyarrow for Parquet). check_rows: called with
    the rows that are read, as reward functions will receive them, and the name of a row by its place.

    Raises ConfigError, one paragraph: no or unknown source, missing or empty file, missing column, a row that cannot
    be a prompt (which, and why), too few rows for the held-out set and one step.
    """
    check_settings(config.data)
    if config.data.dataset_name and not read_hub:
        if config.data.eval_data_files:
            _drafts(config, read_files(config.data.eval_data_files, "data.eval_data_files"), check_rows)
        return None
    train, held_out = read_sources(config)
    drafts = _drafts(config, train, check_rows)
    if held_out is not None and config.data.num_eval_prompts:
        _drafts(config, held_out, check_rows)
    _check_sizes(config, train, held_out)
    return list(drafts[0].row)


def _drafts(config: Config, table: Table, check_rows: CheckRows | None) -> list[Draft]:
    drafts = draft_prompts(config.data, table)
    if check_rows is not None:
        check_rows([draft.row for draft in drafts], table.where)
    return drafts


def load_prompts(
    config: Config,
    tokenizer: Any,
    *,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    context_length: int | None = None,
    vocab_size: int | None = None,
) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on and the prompts held out (at most `num_eval_prompts`), each indexed from 0.

    Held out are, in this order of preference: `eval_dataset`, `data.eval_data_files`, the eval split; of these every
    k-th row, whatever the seed. A task makes its own. Otherwise rows of the training data drawn by the seed, and
    training rows with the same prompt are left out, so that no held-out prompt is ever trained on.

    Args:
        tokenizer: a transformers tokenizer with an end token; a chat template where prompts are conversations.
        train_dataset, eval_dataset: a datasets Dataset, IterableDataset or DatasetDict, a list of dicts, or an
            iterable of dicts (read up to num_train_prompts + num_eval_prompts rows).
        context_length: tokens the model can read; with max_completion_length it bounds the prompt.
        vocab_size: rows of the model's embedding.

    Raises ConfigError, one paragraph, for whatever of this cannot work.
    """
    check_settings(config.data)
    warned: set[str] = set()
    train_rows, held_out_rows = read_sources(config, train_dataset, eval_dataset)
    train = _prompts_of(train_rows, config, tokenizer, context_length, vocab_size, warned)
    wanted = config.data.num_eval_prompts
    if not wanted:
        held_out: list[Prompt] = []
    elif held_out_rows is None:
        _check_sizes(config, train_rows, None, len(train))
        train, held_out = _hold_out(train, wanted, config.run.seed)
    else:
        held_out = _spread(_prompts_of(held_out_rows, config, tokenizer, context_length, vocab_size, warned), wanted)
        given = eval_dataset is not None or config.data.eval_data_files
        _check_overlap(train, held_out, None if given else config.data.task)
    check_enough(len(train), plan_batch(config).prompts)
    log.info("%d prompts to train on, %d held out.", len(train), len(held_out))
    return _numbered(train), _numbered(held_out)


def load_held_out(
    config: Config,
    tokenizer: Any,
    *,
    eval_dataset: Any = None,
    context_length: int | None = None,
    vocab_size: int | None = None,
) -> list[Prompt]:
    """The held-out prompts alone, the same ones as `load_prompts` gives; training data are read only to draw them from.

    So `eval_dataset`, `data.eval_data_files` or a hub dataset with an eval split is enough. Arguments and errors as in
    `load_prompts`.
    """
    check_settings(config.data)
    table = read_held_out(config, eval_dataset)
    if table is None:
        return load_prompts(config, tokenizer, context_length=context_length, vocab_size=vocab_size)[1]
    prompts = _prompts_of(table, config, tokenizer, context_length, vocab_size)
    return _numbered(_spread(prompts, config.data.num_eval_prompts))


def _prompts_of(
    table: Table,
    config: Config,
    tokenizer: Any,
    context_length: int | None,
    vocab_size: int | None,
    warned: set[str] | None = None,
) -> list[Prompt]:
    limit, why = _longest_prompt(config, context_length)
    drafts = draft_prompts(config.data, table)
    prompts = encode(
        drafts,
        tokenizer,
        table.where,
        chat_template_kwargs=config.data.chat_template_kwargs,
        vocab_size=vocab_size,
        warned=warned,
    )
    return _within(prompts, limit, why, config.data.long_prompts, table.where)


def _longest_prompt(config: Config, context_length: int | None) -> tuple[int | None, str]:
    """The most tokens a prompt may have, and the arithmetic behind it."""
    longest, answer = config.data.max_prompt_length, config.rollout.max_completion_length
    if context_length is None:
        return longest, "max_prompt_length"
    room = context_length - answer
    if room < 1:
        raise ConfigError(
            f"max_completion_length {answer} leaves no room for a prompt in the model's context of {context_length} "
            "tokens. Lower max_completion_length."
        )
    if longest is not None and longest > room:
        raise ConfigError(
            f"max_prompt_length {longest} + max_completion_length {answer} = {longest + answer} tokens, and the "
            f"model's context is {context_length}. Lower one of them."
        )
    if longest is not None:
        return longest, "max_prompt_length"
    return room, f"context {context_length} - max_completion_length {answer}"


def _within(
    prompts: list[Prompt], limit: int | None, why: str, policy: str, where: Callable[[int], str]
) -> list[Prompt]:
    """Apply the policy for prompts longer than the limit: refuse, or drop and say how many."""
    if limit is None:
        return prompts
    long = [prompt for prompt in prompts if len(prompt.ids) > limit]
    if not long:
        return prompts
    longest = max(long, key=lambda prompt: len(prompt.ids))
    found = (
        f"{len(long)} of {len(prompts)} prompts {'is' if len(long) == 1 else 'are'} longer than {limit} tokens "
        f"({why}); the longest has {len(longest.ids)} ({where(longest.index)})"
    )
    if policy == "error" or len(long) == len(prompts):
        hint = "Raise the limit" + (
            ", or set data.long_prompts to drop to leave them out." if policy == "error" else "."
        )
        raise ConfigError(f"{found}, the first is {where(long[0].index)} with {len(long[0].ids)}. {hint}")
    log.warning("Dropped: %s.", found)
    return [prompt for prompt in prompts if len(prompt.ids) <= limit]


def _check_sizes(config: Config, train: Table, held_out: Table | None, usable: int | None = None) -> None:
    """Before the split: are there rows for a step, and for the held-out set where it is taken from the same rows?"""
    step = plan_batch(config).prompts
    found = len(train.rows) if usable is None else usable
    wanted = config.data.num_eval_prompts if held_out is None else 0
    if not wanted:
        check_enough(found, step)
    elif found < wanted + step:
        raise ConfigError(
            f"{train.name} has {found} usable row{'' if found == 1 else 's'}, and {wanted} held-out prompts "
            f"(num_eval_prompts) + {step} for one step = {wanted + step} are needed. Give more rows, lower "
            "num_eval_prompts or prompts_per_step, or give an evaluation set of its own."
        )


def _hold_out(prompts: Sequence[Prompt], wanted: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Draw distinct prompts by the seed; the rest is for training, without those that read the same."""
    held: dict[tuple[int, ...], Prompt] = {}
    for place in permutation(len(prompts), seed, "held out"):
        if len(held) == wanted:
            break
        held.setdefault(prompts[place].ids, prompts[place])
    train = [prompt for prompt in prompts if prompt.ids not in held]
    repeats = len(prompts) - len(train) - len(held)
    if repeats:
        log.warning("%d rows repeat a held-out prompt and are left out of training.", repeats)
    return train, sorted(held.values(), key=lambda prompt: prompt.index)


def _spread(prompts: Sequence[Prompt], wanted: int) -> list[Prompt]:
    """All, or `wanted` of them at equal distances: a fair sample of a set that is sorted, the same for every seed."""
    if len(prompts) <= wanted:
        return list(prompts)
    return [prompts[place * len(prompts) // wanted] for place in range(wanted)]


def _check_overlap(train: Sequence[Prompt], held_out: Sequence[Prompt], task: str | None) -> None:
    """Rows of one task that read the same are refused; sets given separately are the user's, who is warned."""
    trained = {prompt.ids for prompt in train}
    both = [prompt for prompt in held_out if prompt.ids in trained]
    if not both:
        return
    found = f"{len(both)} of {len(held_out)} held-out prompts are in the training set too, such as {both[0].text!r}"
    if task:
        raise ConfigError(
            f"{found}: rows of task {task} differ, and the prompts made of them do not. Let data.prompt_template name "
            "every column that the answer depends on."
        )
    log.warning("%s. The held-out pass rate will say too much.", found)


def _numbered(prompts: Sequence[Prompt]) -> list[Prompt]:
    return [dataclasses.replace(prompt, index=index) for index, prompt in enumerate(prompts)]
