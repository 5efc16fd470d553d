"""The user's own rows: CSV or JSON with a text and a label."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from weightlora.errors import DataError
from weightlora.text import closest


def read_rows(path: str | Path, *, text: str = "text", label: str | None = "label") -> list[tuple[str, str]]:
    """Return (text, label) of each row of a ``.csv``, ``.json`` (a list of objects) or ``.jsonl`` file.

    Args:
        path: The file.
        text: Name of the text's column.
        label: Name of the label's column; None where there is none, and the label is then empty.

    Raises:
        DataError: The file is missing, malformed or empty, or lacks a column (the text names the closest).
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(content, newline="")))
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in content.splitlines() if line.strip()]
        else:
            rows = json.loads(content)
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not rows:
        raise DataError(f"{path} has no rows")
    for column in filter(None, (text, label)):
        if column not in rows[0]:
            raise DataError(f"{path} has no column {column!r}{closest(column, rows[0])}; it has {', '.join(rows[0])}")
    return [(str(row[text]), str(row[label]) if label else "") for row in rows]


def number_labels(rows: Iterable[tuple[str, str]]) -> tuple[list[tuple[str, int]], list[str]]:
    """Return the rows with numbered labels, and the labels in the order of their numbers.

    Example:
        >>> number_labels([("a", "yes"), ("b", "no"), ("c", "yes")])
        ([('a', 1), ('b', 0), ('c', 1)], ['no', 'yes'])
    """
    rows = list(rows)
    labels = sorted({label for _, label in rows})
    return [(text, labels.index(label)) for text, label in rows], labels
