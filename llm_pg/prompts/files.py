"""Local files of rows: JSONL, JSON, CSV, TSV and Parquet, without torch and without datasets."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import ConfigError, nearest
from .table import Table, article

LONGEST_FIELD = 2**31 - 1  # characters of a CSV file's; the csv module stops at 131,072, and a column of tests may not
READABLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


def read_files(names: str | Sequence[str], setting: str) -> Table:
    """The rows of these files, in order; a name may be a pattern with * in it. `setting` is named in messages."""
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ConfigError(f"{setting} is an empty list; name at least one file.")
    return Table.join([_read(path) for name in names for path in _paths(name, setting)])


def _paths(name: str, setting: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        found = [path]
    elif path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in READABLE)
        raise ConfigError(
            f"{setting} is a folder: {str(path)!r}. Name files; in it there are {', '.join(inside) or 'none to read'}."
        )
    elif any(sign in name for sign in "*?["):
        found = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
        if not found:
            raise ConfigError(f"{setting} {name!r} matches no file in {str(Path.cwd())!r}.")
    else:
        raise ConfigError(_missing(path, setting))
    for path in found:
        if path.suffix not in READABLE:
            raise ConfigError(
                f"Cannot read {str(path)!r} ({setting}): its name ends in {path.suffix or 'no known way'!r}, and rows "
                f"are read from {', '.join(READABLE)}."
            )
    return found


def _missing(path: Path, setting: str) -> str:
    if not path.parent.is_dir():
        return f"There is no file {str(path)!r} ({setting}), nor a folder {str(path.parent)!r}."
    beside = sorted(p.name for p in path.parent.iterdir() if p.suffix in READABLE)
    there = f" Beside it are {', '.join(beside[:8])}." if beside else ""
    return f"There is no file {str(path)!r} ({setting}).{nearest(path.name, beside)}{there}"


def _read(path: Path) -> Table:
    if path.suffix == ".parquet":
        return _read_parquet(path)
    try:
        if path.suffix in (".csv", ".tsv"):
            return _read_csv(path)
        if path.suffix == ".json":
            return _read_json(path)
        return _read_jsonl(path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}.") from None


def _read_jsonl(path: Path) -> Table:
    rows: list[Any] = []
    lines: list[int] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ConfigError(
                    f"Line {number} of {path} (row {len(rows)}) is not JSON: {error}. Each line holds one object."
                ) from None
            lines.append(number)
    return Table(path.name, rows, lines)


def _read_json(path: Path) -> Table:
    """A list of objects; or, as other tools write them into .json as well, an object a line."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return Table(path.name, ())
    try:
        rows = json.loads(text)
    except ValueError as error:
        if "Extra data" in str(error):
            return _read_jsonl(path)
        raise ConfigError(f"{path} is not JSON: {error}.") from None
    if not isinstance(rows, list):
        raise ConfigError(
            f"{path} holds {article(rows)}, and rows are read from a list of objects, or from one object a line."
        )
    return Table(path.name, rows)


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        return Table(path.name, pyarrow.parquet.ParquetFile(path).read().to_pylist())
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}") from None


def _read_csv(path: Path) -> Table:
    rows: list[list[str]] = []
    lines: list[int] = []
    with path.open(encoding="utf-8-sig", newline="") as file, _long_fields():
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            header = next(reader, [])
            begins = reader.line_num + 1
            for row in reader:
                if row:
                    rows.append(row)
                    lines.append(begins)
                begins = reader.line_num + 1
        except csv.Error as error:
            raise ConfigError(f"Line {reader.line_num} of {path} (row {len(rows)}) is not CSV: {error}.") from None
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ConfigError(f"The header of {path} names {', '.join(map(repr, twice))} more than once.")
    for index, (row, line) in enumerate(zip(rows, lines, strict=True)):
        if len(row) != len(header):
            raise ConfigError(
                f"Row {index} of {path} (line {line}) has {len(row)} fields, and the header has {len(header)}: "
                f"{', '.join(header)}. Quote fields that hold a separator or a line break."
            )
    columns = [_typed([row[place] for row in rows]) for place in range(len(header))]
    records = [dict(zip(header, values, strict=True)) for values in zip(*columns, strict=True)]
    return Table(path.name, records, lines)


@contextmanager
def _long_fields() -> Iterator[None]:
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _typed(texts: list[str]) -> list[Any]:
    """A column as whole numbers, or as numbers, when that loses nothing of any of its texts; else as text."""
    for kind in (int, float):
        try:
            values = [kind(text) for text in texts]
        except ValueError:
            continue
        if all(str(value) == text for value, text in zip(values, texts, strict=True)):
            return values
    return texts
