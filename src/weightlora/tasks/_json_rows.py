"""The objects of a JSON file, one after the other; a piece of the text is in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, TextIO

from weightlora.errors import DataError
from weightlora.tasks._place import Place

#: Characters that are read at once, or more where a single value is longer.
_PIECE = 2**16


def json_rows(path: Path, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
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
