"""The user's own file of rows: CSV, JSON, JSON Lines or Parquet, read by one set of rules.

A CSV cell is the text that is written there: ``007``, ``null`` and ``NA`` stay as they are. A line has as many cells as
the header. In JSON, rows are the objects of one list, or objects that follow each other. A byte order mark is no part
of the text. U+2028 is a character like any other and ends no line.
"""

from __future__ import annotations

import csv
import json
from array import array
from bisect import bisect_left
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, TextIO
from uuid import uuid4

from weightlora.errors import DataError
from weightlora.tasks.base import Place, Task
from weightlora.text import closest

if TYPE_CHECKING:
    from datasets import Dataset

ENDINGS = (".csv", ".json", ".jsonl", ".parquet")

#: Rows that are Python objects at a time, and a part of the rows before them; Arrow holds those.
_BLOCK, _PART = 1000, 100
#: Characters of JSON that are read at once, or more where a single value is longer.
_PIECE = 2**16

#: A row's line in the file, and its columns; 0 where the rows are one list.
Record = tuple[int, Mapping[str, Any]]


def read_file(path: Path, task: Task, most: int | None = None) -> tuple[Dataset, Place]:
    """Return the task's columns of a file's rows, and where each row is.

    Args:
        path: The file.
        task: Says which columns.
        most: Only the first rows, so many; the rest of the file is not read. None reads all.

    Raises:
        DataError: There is no such file, it is malformed, it has no rows, or it lacks a column.
    """
    if path.suffix.lower() not in ENDINGS:
        raise DataError(f"{path} ends with {path.suffix!r}; give a file that ends with {', '.join(ENDINGS)}")
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, task, most)
    with _opened(path) as file, _long_cells(path.stat().st_size):
        records = _csv_records(path, file) if path.suffix.lower() == ".csv" else _json_records(path, file)
        return _gathered(path, task, islice(records, most))


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


@contextmanager
def _opened(path: Path) -> Generator[TextIO]:
    """The text of a file, with its line ends as they are, and errors of reading as our own."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise _no_utf8(path) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _no_utf8(path: Path) -> DataError:
    """The error with the first line that is no UTF-8."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                wrong = f"the byte 0x{line[error.start]:02x}, which is no UTF-8; save the file as UTF-8"
                return DataError(f"line {number} of {path} has {wrong}")
    raise AssertionError(f"{path} was changed while it was read")


@contextmanager
def _long_cells(length: int) -> Generator[None]:
    """Let a CSV cell be as long as the file for the block; by default the module refuses 131,072 characters."""
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, length))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _csv_records(path: Path, file: TextIO) -> Iterator[Record]:
    lines = csv.reader(file, strict=True)
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


def _gathered(path: Path, task: Task, records: Iterable[Record]) -> tuple[Dataset, Place]:
    """The task's columns of the records, which are in memory a block at a time."""
    import pyarrow as pa
    from datasets import Dataset

    records = iter(records)
    lines = array("q")
    place = Place(str(path))
    present: dict[str, None] = {}
    columns: dict[str, Any] = dict.fromkeys(task.columns.values())
    while block := list(islice(records, _BLOCK + len(lines) // _PART)):
        lines.extend(line for line, _ in block)
        place = Place(str(path), lines if lines[0] else None)
        present.update((name, None) for _, row in block for name in row)
        columns = {
            name: _longer(name, have, [row.get(name) for _, row in block], place) for name, have in columns.items()
        }
    if not lines:
        raise DataError(f"{path} has no rows")
    check_columns(task, place, tuple(present))
    # A fingerprint of its own: datasets would pickle all rows to make one, and reads it for cached files alone.
    return Dataset(pa.table(columns), fingerprint=uuid4().hex), place


def _longer(name: str, column: Any, values: Sequence[Any], place: Place) -> Any:
    """The column with further values, all of one type; None is a column without any.

    Raises:
        DataError: With the first row whose value does not go with those before it.
    """
    longer = _joined(column, values)
    if longer is not None:
        return longer
    odd = bisect_left(range(len(values)), True, key=lambda i: _joined(column, values[: i + 1]) is None)
    chunks: Sequence[Any] = () if column is None else column.chunks
    earlier = chain(values[:odd], *(chunk.to_pylist() for chunk in chunks))
    before = sorted({type(value).__name__ for value in earlier if value is not None})
    alone = _joined(None, [values[odd]]) is not None
    reason = f"does not go with the values before it, of type {', '.join(before)}"
    raise DataError(
        f"{place.row(sum(map(len, chunks)) + odd)} has {shorten(repr(values[odd]), 60)} as its {name!r}, which "
        + (reason if alone else "is no valid text, number or list")
    )


def _joined(column: Any, values: Sequence[Any]) -> Any:
    """The column with further values, of the narrowest type that has them all; None where there is none."""
    import pyarrow as pa

    try:
        parts = [pa.table({"": part}) for part in (column, pa.array(values)) if part is not None]
        return pa.concat_tables(parts, promote_options="permissive").column(0)
    except (ValueError, TypeError, OverflowError, pa.ArrowException):
        return None


def _read_parquet(path: Path, task: Task, most: int | None) -> tuple[Dataset, Place]:
    import pyarrow as pa
    from datasets import Dataset
    from pyarrow import parquet

    place = Place(str(path))
    try:
        check_columns(task, place, parquet.read_schema(path).names)
        names = list(dict.fromkeys(task.columns.values()))
        table = parquet.read_table(path, columns=names) if most is None else _first_rows(path, names, most)
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


def _first_rows(path: Path, names: Sequence[str], most: int) -> Any:
    """The first rows of a Parquet file; the row groups behind them are not read."""
    import pyarrow as pa
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        batches = file.iter_batches(min(most, _BLOCK), columns=names)
        count, found = 0, []
        while count < most and (batch := next(batches, None)) is not None:
            count += len(batch)
            found.append(batch)
        return pa.Table.from_batches(found, None if found else file.schema_arrow).slice(0, most)


# -- JSON: a piece of the text is in memory at a time ------------------------------------------------------------------


def _json_records(path: Path, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row with the line it begins on, or with 0 where the rows are one list.

    Args:
        path: For errors.
        file: Its text, with the line ends as they are.

    Raises:
        DataError: With the line of what is no JSON, or no object.
    """
    text = _Text(path, file)
    if text.following() == "[":
        for number, value in enumerate(_elements(text)):
            yield 0, _row(value, Place(str(path)).row(number))
        if text.following():
            raise DataError(f"line {text.line()} of {path} goes on after the list of its rows; a file has one list")
        return
    while text.following():
        yield text.line(), _row(text.value(), f"line {text.line()} of {path}")


def _elements(text: _Text) -> Iterator[Any]:
    """The values of the list that begins here, each as it is read."""
    text.position += 1
    if text.following() != "]":
        yield text.value()
        while text.following() == ",":
            text.position += 1
            text.following()
            yield text.value()
    if text.following() != "]":
        raise text.fault("Expecting ',' delimiter", text.position)
    text.position += 1


def _row(value: Any, at: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{at} is {shorten(repr(value), 60)}; a row is an object: {{"column": value, ...}}')
    return value  # pyright: ignore[reportUnknownVariableType]


@dataclass
class _Text:
    """A piece of a file's text, and how far it was read."""

    path: Path
    file: TextIO
    piece: str = ""
    position: int = 0
    counted: int = 0
    """The place in the piece up to which lines were counted."""
    lines: int = 1
    """The line of that place."""
    before: int = 0
    """Characters of the piece's first line that are no longer there."""

    def following(self) -> str:
        """Go to the next character that is no blank, and return it; empty at the end of the file."""
        while True:
            while self.position < len(self.piece):
                if self.piece[self.position] not in " \t\r\n":
                    return self.piece[self.position]
                self.position += 1
            if not self._read():
                return ""

    def value(self) -> Any:
        """Read the value that begins here.

        Raises:
            DataError: It is no JSON, or not allowed: a key twice, a number of 5,000 digits, a thousand brackets.
        """
        while True:
            try:
                value, end = _DECODER.raw_decode(self.piece, self.position)
            except json.JSONDecodeError as error:
                if not self._read():
                    raise self.fault(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"the value that begins on line {self.line()} of {self.path} is not allowed: {error}"
                ) from error
            else:
                if end < len(self.piece) or not self._read():  # a number may go on in the next piece
                    self.position = end
                    return value

    def line(self) -> int:
        """The line of the position, from 1."""
        self.lines += self.piece.count("\n", self.counted, self.position)
        self.counted = self.position
        return self.lines

    def fault(self, reason: str, place: int) -> DataError:
        """The error that the piece is no JSON at ``place``."""
        line = self.line() + self.piece.count("\n", self.position, place)
        start = self.piece.rfind("\n", 0, place) + 1
        column = place - start + 1 + (0 if start else self.before)
        return DataError(f"line {line} of {self.path} is no JSON: {reason}, column {column}")

    def _read(self) -> bool:
        """Drop what was read and add as much as is left, at least a piece; False at the end of the file."""
        left = self.piece[self.position :]
        added = self.file.read(max(_PIECE, len(left)))
        if not added:
            return False
        self.line()
        start = self.piece.rfind("\n", 0, self.position) + 1
        self.before = self.position - start + (0 if start else self.before)
        self.piece, self.position, self.counted = left + added, 0, 0
        return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
