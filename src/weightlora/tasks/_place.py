"""Where the rows of a split are from, so that an error names the file and the row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A file or a split, and the line of each row where there are lines.

    Example:
        >>> Place("a.csv", (2, 3)).row(1), Place("the split 'train'").row(1)
        ('line 3 of a.csv', "row 2 of the split 'train'")
    """

    name: str
    lines: Sequence[int] | None = None

    def row(self, number: int) -> str:
        """Name the row of a position that counts from 0; in the text rows count from 1, as lines do."""
        at = f"row {number + 1}" if self.lines is None else f"line {self.lines[number]}"
        return f"{at} of {self.name}"
