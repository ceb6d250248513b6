"""Rows of data with the words to point at one of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from ..config import ConfigError
from .prompt import log

DataRow = dict[str, Any]


class Table:
    """Rows from one source. Columns are the union over the rows; where a row lacks one, it holds None.

    name: what messages call the source.
    lines: for a text file, the line on which each row begins, from 1.
    """

    def __init__(self, name: str, rows: Iterable[Any], lines: Sequence[int] | None = None) -> None:
        self.name = name
        self._parts: list[tuple[int, str, Sequence[int] | None]] = [(0, name, lines)]
        self.rows: list[DataRow] = []
        for index, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise ConfigError(
                    f"{self.where(index)} is {article(row)} ({short(row)}). A row maps columns to values, for "
                    'example {"prompt": "2+2=", "answer": 4}.'
                )
            self.rows.append(dict(row))
        self._fill()

    def _fill(self) -> None:
        columns = dict.fromkeys(column for row in self.rows for column in row)
        odd = [column for column in columns if not isinstance(column, str)]
        if odd:
            raise ConfigError(f"A column of {self.name} is named {odd[0]!r}; names of columns are text.")
        self.columns: list[str] = list(columns)
        if any(len(row) != len(columns) for row in self.rows):
            self.rows = [{column: row.get(column) for column in columns} for row in self.rows]

    def where(self, index: int) -> str:
        """'row 2 of train.jsonl (line 3)'; rows count from 0, lines from 1."""
        part = bisect_right(self._parts, index, key=lambda part: part[0]) - 1
        first, name, lines = self._parts[part]
        line = f" (line {lines[index - first]})" if lines and index - first < len(lines) else ""
        return f"row {index - first} of {name}{line}"

    @classmethod
    def join(cls, tables: Sequence[Table]) -> Table:
        """One table of several, in order; `where` still names the source of each row."""
        if len(tables) == 1:
            return tables[0]
        whole = cls(", ".join(table.name for table in tables), ())
        whole._parts.clear()
        for table in tables:
            first = len(whole.rows)
            whole._parts += [(first + start, name, lines) for start, name, lines in table._parts]
            whole.rows += table.rows
        whole._fill()
        return whole

    def cut(self, size: int) -> tuple[Table, Table]:
        """The first `size` rows and the rest."""
        head, tail = Table(self.name, self.rows[:size]), Table(self.name, self.rows[size:])
        head._parts = self._parts
        tail._parts = [(first - size, name, lines) for first, name, lines in self._parts]
        return head, tail


def head(rows: Iterable[Any], most: int, name: str, setting: str) -> Iterator[Any]:
    """The first rows of what may not end, with a warning where there are more. setting: what `most` comes from."""
    iterator = iter(rows)
    yield from islice(iterator, most)
    if next(iterator, None) is not None:
        log.warning("Of %s the first %d rows are used, and it has more; %s sets how many.", name, most, setting)


def short(value: Any, width: int = 60) -> str:
    """repr of a value, cut to about `width` characters."""
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def article(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
