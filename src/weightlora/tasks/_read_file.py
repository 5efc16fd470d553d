"""The user's own file of rows: CSV, JSON, JSON Lines or Parquet, read by one set of rules.

A CSV cell is the text that is written there: ``007``, ``null`` and ``NA`` stay as they are. A line has as many cells as
the header. In JSON, rows are the objects of one list, or objects that follow each other. A byte order mark is no part
of the text. U+2028 is a character like any other and ends no line.
"""

from __future__ import annotations

import csv
import io
import json
from bisect import bisect_left
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from weightlora.errors import DataError
from weightlora.tasks._place import Place
from weightlora.tasks.base import Task
from weightlora.text import closest

if TYPE_CHECKING:
    from datasets import Dataset

ENDINGS = (".csv", ".json", ".jsonl", ".parquet")

#: A row's line in the file, and its columns; 0 where the rows are one list.
Record = tuple[int, Mapping[str, Any]]


def read_file(path: Path, task: Task) -> tuple[Dataset, Place]:
    """Return the task's columns of a file, and where each row is.

    Raises:
        DataError: There is no such file, it is malformed, it has no rows, or it lacks a column.
    """
    if path.suffix.lower() not in ENDINGS:
        raise DataError(f"{path} ends with {path.suffix!r}; give a file that ends with {', '.join(ENDINGS)}")
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, task)
    text = _decoded(path)
    with _long_cells(len(text)):
        records = list(_csv_records(path, text) if path.suffix.lower() == ".csv" else _json_records(path, text))
    if not records:
        raise DataError(f"{path} has no rows")
    place = Place(str(path), tuple(line for line, _ in records) if records[0][0] else None)
    check_columns(task, place, tuple({name: None for _, row in records for name in row}))
    from datasets import Dataset

    rows = [row for _, row in records]
    return Dataset.from_dict({name: _column(name, rows, place) for name in dict.fromkeys(task.columns.values())}), place


def check_columns(task: Task, place: Place, present: Sequence[str]) -> None:
    """Raise where a column of the task is missing.

    Raises:
        DataError: With the columns that there are, and the option that names one.
    """
    for role, column in task.columns.items():
        if column not in present:
            raise DataError(
                f"{place.name} has no column {column!r}{closest(column, present)} for the role {role!r} of "
                f"{task.name}; it has {', '.join(map(repr, present))}; name yours with columns: {role}=..."
            )


def _decoded(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"line {line} of {path} has the byte 0x{raw[error.start]:02x}, which is no UTF-8; save the file as UTF-8"
        ) from error


@contextmanager
def _long_cells(length: int) -> Generator[None]:
    """Let a CSV cell be as long as the file for the block; by default the module refuses 131,072 characters."""
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, length))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _csv_records(path: Path, text: str) -> Iterator[Record]:
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    first = 1  # a record begins on the line after the last one's end
    try:
        for cells in lines:
            if header is None and cells:
                header = cells
                twice = [name for i, name in enumerate(cells) if name in cells[:i]]
                if twice:
                    raise DataError(f"the header of {path} has the column {twice[0]!r} twice; rename one")
            elif header is not None and cells:  # an empty line is no row
                if len(cells) != len(header):
                    raise DataError(
                        f"line {first} of {path} has {_count(cells)}, but its header has {_count(header)} "
                        f"({', '.join(header)}); write a text that has a comma or a quote in it in quotes"
                    )
                yield first, dict(zip(header, cells, strict=True))
            first = lines.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"the row that begins on line {first} of {path} is no CSV: {error}; correct its quotes"
        ) from error


def _count(cells: Sequence[str]) -> str:
    return f"{len(cells)} cell{'s' * (len(cells) != 1)}"


def _json_records(path: Path, text: str) -> Iterator[Record]:
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    position, line, counted = _after_blanks(text, 0), 1, 0
    while position < len(text):
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"line {error.lineno} of {path} is no JSON: {error.msg}, column {error.colno}") from error
        except (ValueError, RecursionError) as error:  # a key twice, a number of 5,000 digits, a thousand brackets
            raise DataError(f"the value that begins on line {line} of {path} is not allowed: {error}") from error
        whole = isinstance(value, list) and position == _after_blanks(text, 0) and _after_blanks(text, end) == len(text)
        for number, row in enumerate(value if whole else [value]):
            if not isinstance(row, dict):
                at = Place(str(path)).row(number) if whole else f"line {line} of {path}"
                raise DataError(f'{at} is {shorten(repr(row), 60)}; a row is an object: {{"column": value, ...}}')
            yield 0 if whole else line, row
        position = _after_blanks(text, end)


def _after_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def _column(name: str, rows: Sequence[Mapping[str, Any]], place: Place) -> Any:
    """The values of a column as an array; all are of one type.

    Raises:
        DataError: With the first row whose value does not go with those before it.
    """
    import pyarrow as pa

    values = [row.get(name) for row in rows]
    try:
        return pa.array(values)
    except (ValueError, TypeError, OverflowError, pa.ArrowException):  # the rest finds the row, for the error
        odd = bisect_left(range(len(values)), True, key=lambda i: not _goes_together(values[: i + 1]))
        before = sorted({type(value).__name__ for value in values[:odd] if value is not None})
        reason = f"does not go with the values before it, of type {', '.join(before)}"
        raise DataError(
            f"{place.row(odd)} has {shorten(repr(values[odd]), 60)} as its {name!r}, which "
            + (reason if _goes_together([values[odd]]) else "is no valid text, number or list")
        ) from None


def _goes_together(values: Sequence[Any]) -> bool:
    import pyarrow as pa

    try:
        pa.array(values)
    except (ValueError, TypeError, OverflowError, pa.ArrowException):
        return False
    return True


def _read_parquet(path: Path, task: Task) -> tuple[Dataset, Place]:
    import pyarrow as pa
    from datasets import Dataset
    from pyarrow import parquet

    place = Place(str(path))
    try:
        check_columns(task, place, parquet.read_schema(path).names)
        table = parquet.read_table(path, columns=list(dict.fromkeys(task.columns.values())))
        for i, column in enumerate(table.columns):
            if pa.types.is_dictionary(column.type):  # pandas' categories
                table = table.set_column(i, table.column_names[i], column.cast(column.type.value_type))
        rows = Dataset(table)
    except (OSError, ValueError, TypeError, KeyError, NotImplementedError, pa.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if len(rows) == 0:
        raise DataError(f"{path} has no rows")
    return rows, place
