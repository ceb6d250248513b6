"""From rows to what the model is asked: renames, extraction, templates, messages. No tokenizer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from string import Formatter

from ..columns import usual_column
from ..config import ConfigError, nearest
from ..config.schema import DataConfig
from .table import DataRow, Table, article, short

Messages = list[dict[str, str]]
# Columns that mean something to TRL's trainers which would be lost here without a word.
_TRL_COLUMNS = {
    "tools": "gives the model the descriptions of tools",
    "image": "shows the model an image",
    "images": "shows the model images",
}


_MESSAGES = ("messages", "conversation", "conversations", "chat")


@dataclass(frozen=True)
class Draft:
    """A prompt before the tokenizer: plain text or messages, and the row with every column for reward functions."""

    content: str | Messages
    row: DataRow


@dataclass(frozen=True)
class _Shape:
    """The settings of DataConfig that say how a row becomes a prompt, parsed."""

    data: DataConfig
    extract: dict[str, re.Pattern[str]]
    template: list[tuple[str, str | None]] | None

    @property
    def prompt_columns(self) -> list[str]:
        if self.template is None:
            return [self.data.prompt_column]
        return list(dict.fromkeys(name for _, name in self.template if name))


def draft_prompts(data: DataConfig, table: Table) -> list[Draft]:
    """A draft of every row. Raises ConfigError, naming row and column, at the first row that cannot be a prompt."""
    shape = _parse(data)
    if not table.rows:
        raise ConfigError(f"There are no rows in {table.name}; nothing can be trained on or evaluated.")
    _check_columns(shape, table)
    drafts = []
    first: Draft | None = None
    for index, raw in enumerate(table.rows):
        where = table.where(index)
        row = _renamed_and_extracted(shape, raw, where)
        draft = Draft(_content(shape, row, where, table), row)
        _check_text(draft.content, where)
        first = first or draft
        if isinstance(draft.content, str) != isinstance(first.content, str):
            kinds = {True: "plain text", False: "a list of messages"}
            raise ConfigError(
                f"The prompt of {where} is {kinds[isinstance(draft.content, str)]}, and the prompts before it are "
                f"{kinds[isinstance(first.content, str)]} (column {data.prompt_column!r}). Use one format in a "
                "dataset, or set data.chat to true, which makes a conversation of plain text."
            )
        drafts.append(draft)
    return drafts


def check_settings(data: DataConfig) -> None:
    """ConfigError where the settings alone, whatever the rows, cannot work."""
    _parse(data)
    if data.dataset_streaming:
        _check_stream(data)


def _check_stream(data: DataConfig) -> None:
    if data.dataset_name is None:
        raise ConfigError(
            "data.dataset_streaming is true and no data.dataset_name is given: a task and files are not streamed. Give "
            "a hub dataset, or leave it false; an IterableDataset from Python needs no setting."
        )
    for setting in ("dataset_split", "dataset_eval_split"):
        split = getattr(data, setting)
        if split is not None and any(sign in split for sign in "[+"):
            raise ConfigError(
                f"data.{setting} is {split!r} and data.dataset_streaming is true: a stream has a beginning and no "
                "known length, so no part of it can be named. Give the plain name of one split; the rows are its "
                "first ones, as many as num_train_prompts and num_eval_prompts say."
            )


def _parse(data: DataConfig) -> _Shape:
    if data.chat is False and data.system_prompt is not None:
        raise ConfigError(
            "data.chat is false and data.system_prompt is given: a system prompt needs a conversation. Drop one."
        )
    extract = {}
    for column, pattern in data.extract.items():
        try:
            extract[column] = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"data.extract.{column} is no regular expression: {pattern!r}: {error}.") from None
        if not extract[column].groups:
            raise ConfigError(
                f"data.extract.{column} {pattern!r} has no group. Put what to keep in brackets: '####\\s*(.+)'."
            )
    template = None if data.prompt_template is None else _parse_template(data.prompt_template)
    return _Shape(data, extract, template)


def _parse_template(text: str) -> list[tuple[str, str | None]]:
    """(literal, column after it or None) pairs. Only plain {column} fields: no attributes, indices or formats."""
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(
            f"data.prompt_template cannot be read: {error}. Fields are written {{column}}, and a brace itself is "
            f"doubled; got {short(text)}."
        ) from None
    for _, name, form, conversion in parts:
        if name is not None and (not name or form or conversion or re.search(r"[.\[\]]", name)):
            raise ConfigError(
                f"data.prompt_template has the field {{{name}{'!' + conversion if conversion else ''}"
                f"{':' + form if form else ''}}}. A field is the plain name of a column, as in {{question}}."
            )
    if not any(name for _, name, _, _ in parts):
        raise ConfigError(f"data.prompt_template names no column, so all prompts would be the same: {short(text)}.")
    return [(literal, name) for literal, name, _, _ in parts]


def _check_columns(shape: _Shape, table: Table) -> None:
    data = shape.data
    wanted = [(column, f"data.columns.{new}") for new, column in data.columns.items()]
    for setting, columns in (
        ("data.prompt_template" if shape.template else "data.prompt_column", shape.prompt_columns),
        ("data.extract", list(shape.extract)),
    ):
        wanted += [(column, setting) for column in columns if column not in data.columns]
    theirs = [column for column in _TRL_COLUMNS if column in table.columns]
    if theirs:
        raise ConfigError(
            f"{table.name} has the column {theirs[0]!r}, from which TRL {_TRL_COLUMNS[theirs[0]]}, and this trainer "
            "does not. Remove the column, or rename it where it is there for reward functions alone."
        )
    for column, setting in wanted:
        if column not in table.columns:
            hint = nearest(column, table.columns)
            if setting == "data.prompt_column":
                hint = _prompt_hint(hint, table) or (
                    f"{hint} Say which column holds the prompt with data.prompt_column, or use data.prompt_template."
                )
            raise ConfigError(
                f"There is no column {column!r} in {table.name} ({setting}); its columns are "
                f"{', '.join(table.columns)}.{hint}"
            )


def _prompt_hint(near: str, table: Table) -> str | None:
    """Which setting would name the prompts of a table without the column; None where no column has a usual name.

    near: about a column of nearly the same name, which is a better guess; "" = there is none.
    """
    usual = usual_column("prompt", table.columns)
    if usual is not None and (not near or repr(usual) in near):
        return f"{near} Set prompt_column={usual}, or make the prompt of several columns by data.prompt_template."
    for name in () if near else _MESSAGES:
        messages = table.rows[0].get(name)
        if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
            if messages[-1].get("role") != "assistant":
                return f" Set prompt_column={name}: it holds lists of messages."
            return (
                f" The column {name!r} holds conversations that end with the assistant's answer. Give the messages "
                'before it as the prompt: dataset.map(lambda row: {"prompt": row["' + name + '"][:-1]}).'
            )
    return None


def _renamed_and_extracted(shape: _Shape, raw: DataRow, where: str) -> DataRow:
    """New names first, as copies of the data's columns; then patterns, which may speak of either."""
    row = {**raw, **{new: raw[column] for new, column in shape.data.columns.items()}}
    for column, pattern in shape.extract.items():
        row[column] = _extracted(row[column], column, pattern, where)
    return row


def _extracted(value: object, column: str, pattern: re.Pattern[str], where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ConfigError(
            f"Column {column!r} of {where} is {article(value)} ({short(value)}); data.extract reads text."
        )
    match = pattern.search(str(value))
    if match is None or match.group(1) is None:
        raise ConfigError(
            f"Column {column!r} of {where} does not match data.extract.{column} {pattern.pattern!r}: {short(value)}."
        )
    return match.group(1).strip()


def _content(shape: _Shape, row: DataRow, where: str, table: Table) -> str | Messages:
    data = shape.data
    content = _filled(shape.template, row, where) if shape.template else row[data.prompt_column]
    if isinstance(content, str):
        if not content.strip():
            raise ConfigError(
                f"The prompt of {where} is blank ({short(content)}, column {', '.join(shape.prompt_columns)})."
            )
        if not (data.chat or data.system_prompt is not None):
            return content
        messages: Messages = [{"role": "user", "content": content}]
    elif isinstance(content, list):
        messages = _checked_messages(content, data.prompt_column, where)
        if data.chat is False:
            raise ConfigError(
                f"data.chat is false, and the prompt of {where} is a list of messages (column {data.prompt_column!r})."
            )
    else:
        found = "missing (None" if content is None else f"{article(content)} ({short(content)}"
        raise ConfigError(
            f"The prompt of {where} is {found}, column {data.prompt_column!r}). A prompt "
            f"is text or a list of messages; the columns are {', '.join(table.columns)}."
        )
    if data.system_prompt is None:
        return messages
    if messages[0]["role"] == "system":
        raise ConfigError(
            f"The messages of {where} begin with a system message, and data.system_prompt is given too. Drop one."
        )
    return [{"role": "system", "content": data.system_prompt}, *messages]


def _check_text(content: str | Messages, where: str) -> None:
    """No tokenizer takes half of a surrogate pair, which JSON can hold as an escape."""
    texts = [content] if isinstance(content, str) else [message["content"] for message in content]
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            around = short(text[max(error.start - 10, 0) : error.start + 10])
            raise ConfigError(
                f"The prompt of {where} holds half of a surrogate pair, which is no text, at character {error.start} "
                f"({around}). Repair or drop the row: text.encode(errors='replace').decode() puts a ? in its place."
            ) from None


def _filled(template: list[tuple[str, str | None]], row: DataRow, where: str) -> str:
    parts = []
    for literal, name in template:
        parts.append(literal)
        if name is not None:
            if row[name] is None:
                raise ConfigError(f"Column {name!r} of {where} is empty (None), and data.prompt_template asks for it.")
            parts.append(str(row[name]))
    return "".join(parts)


def _checked_messages(content: list[object], column: str, where: str) -> Messages:
    if not content:
        raise ConfigError(f"The prompt of {where} is an empty list of messages (column {column!r}).")
    messages = []
    for place, message in enumerate(content):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ConfigError(
                f"Message {place} of {where} (column {column!r}) must have a role and a content that are text, as in "
                f'{{"role": "user", "content": "2+2="}}; got {short(message)}.'
            )
        messages.append({key: value for key, value in message.items() if value is not None})
    return messages
